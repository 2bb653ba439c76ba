"""Checkpoint folders with every optional part, to be damaged and mended, and what must become of them.

``SLR_FUZZ=5000`` runs that many random cases of each kind instead of the few fixed ones.
"""

import os
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from slr_core.errors import CheckpointError, SLRError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny

WIDE = int(os.environ.get("SLR_FUZZ", "0"))
SLACK = 2 * 2**30
"""Bytes of address space that loading a checkpoint of some hundred kilobytes may take."""

ALL_PARTS = {
    "block_size": 3,
    "lora": {"rank": [2, 3, 2], "decode_rank": 3},
    "timestep": {"kind": "sinusoidal", "combine": "concat", "noise_level": True},
    "projection": {"kind": "mlp"},
    "residual": {"norm": True},
    "halting_head": True,
    "decoder": {"answers": "latent_decoder", "latent_decoder": {"hidden_size": 8, "layers": 1, "heads": 2}},
}
TEXT = {"prompt_prefix": "w1 ", "answer_prefix": "w2", "stop": ["w36"], "stop_token_ids": [7], "max_new_tokens": 5}
MADE = {
    "append": ("llama", {"workspace": "append"}),
    "block": ("gpt2", {"workspace": "block"}),
    "prompt": ("qwen3", {"workspace": "prompt"}),
}


def cases(count: int) -> settings:
    """So many examples: always the same ones, or as many random ones as were asked for."""
    return settings(max_examples=WIDE or count, derandomize=not WIDE)


class Folder(NamedTuple):
    """A checkpoint that can be damaged and mended."""

    path: Path
    files: dict[str, bytes]

    def write(self, name: str, content: bytes | None) -> None:
        """Replace a file, or take it away."""
        (self.path / name).unlink(missing_ok=True)
        if content is not None:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(content)


def saved(workspace: str) -> Folder:
    """A checkpoint in a new folder."""
    kind, loop = MADE[workspace]
    path = Path(tempfile.mkdtemp(prefix="slr-fuzz-")) / "checkpoint"
    tiny.reasoner(kind, {**ALL_PARTS, **loop}, text=TEXT).save_pretrained(str(path))
    files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return Folder(path, files)


@contextmanager
def checkpoints() -> Iterator[dict[str, Folder]]:
    """A checkpoint of each workspace, with every optional part, until the block ends."""
    made = {workspace: saved(workspace) for workspace in MADE}
    yield made
    for folder in made.values():
        shutil.rmtree(folder.path.parent)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Whatever asks for gigabytes fails, rather than being lent pages that nobody touches."""
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = in_use + SLACK if hard == resource.RLIM_INFINITY else min(in_use + SLACK, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(path: Path) -> str:
    """Why a folder is refused, as promised, or nothing: then it loads and runs."""
    with bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = LatentReasoner.from_pretrained(str(path))
        except CheckpointError as error:
            message = str(error)
            assert str(path) in message
            assert message.isprintable(), message
            assert len(message) < 1000
            assert not re.search("alloc|memory", message, re.IGNORECASE), message
            return message
        with suppress(SLRError):  # such as a model of too few positions
            generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 2}, max_new_tokens=2)])
    return ""


def damaged(folder: Folder, damage: dict[str, bytes | None]) -> str:
    """Damage files of a folder, see why it is refused, if it is, and mend it."""
    try:
        for name, content in damage.items():
            folder.write(name, content)
        return refusal(folder.path)
    finally:
        for name in damage:
            folder.write(name, folder.files.get(name))


def named(folder: Folder, suffix: str = "") -> st.SearchStrategy[str]:
    """The name of one of its files."""
    return st.sampled_from([name for name in folder.files if name.endswith(suffix)])


workspaces = st.sampled_from(list(MADE))
