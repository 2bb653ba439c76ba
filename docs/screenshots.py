"""Take the pictures of the page: ``python docs/screenshots.py``. Needs a running server, chromium and playwright."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent
COLOURS = 48


def save(page: Page, name: str) -> None:
    """Save the whole page as a small PNG."""
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="A server of the checkpoint prosqa.")
    url = parser.parse_args().url
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(url)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Download trace").wait_for()
        slider = page.get_by_role("slider")
        slider.fill("2")
        slider.blur()
        save(page, "page-prosqa.png")
        page.get_by_role("navigation").get_by_role("button", name="Compare").click()
        page.get_by_role("button", name="Perturb").click()
        page.get_by_role("button", name="Compare").last.click()
        page.get_by_role("heading", name="Where the paths part").wait_for()
        save(page, "page-compare.png")
        browser.close()


if __name__ == "__main__":
    main()
