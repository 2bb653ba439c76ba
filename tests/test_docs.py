"""What the documents name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for pattern in ("*.md", "docs/*.md", "configs/*.md", "slr_core/**/README.md") for page in ROOT.glob(pattern)
)
FOLDERS = ("slr_core", "server", "tests", "docs", "configs", "benchmarks", "deploy", "docker")
PATH = re.compile(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?:::(\w+))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def page(path):
    return pytest.param(path, id=str(path.relative_to(ROOT)))


def missing(path, text):
    """Paths and links that lead nowhere, and tests that no file has."""
    for name, test in PATH.findall(text):
        file = ROOT / name
        if "NAME" not in name and not file.exists() and not (ROOT / "tests" / name).exists():
            yield name
        elif test and f"def {test}(" not in (file if file.exists() else ROOT / "tests" / name).read_text():
            yield f"{name}::{test}"
    yield from (link for link in LINK.findall(text) if not (path.parent / link).exists())


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_paths_exist(path):
    assert list(missing(path, path.read_text())) == []


def test_finds_missing_paths():
    text = "`slr_core/gone.py`, `tests/test_docs.py::test_gone`, [a](gone.md), [b](https://x.org/y), `docs/method.md`, \
        `tests/test_docs.py::test_paths_exist`, [c](docs/glossary.md#terms)"
    assert list(missing(ROOT / "README.md", text)) == ["slr_core/gone.py", "tests/test_docs.py::test_gone", "gone.md"]
