import re
import tomllib
from pathlib import Path

import pytest

from slr_core import _install
from slr_core.errors import ConfigError

ROOT = Path(__file__).parents[1]
CODE = sorted(file for folder in ("slr_core", "server") for file in (ROOT / folder).rglob("*.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.md")]


def test_command_names_this_clone():
    assert _install.install_command("train") == f"pip install -e '{ROOT}[train]'"


def test_command_without_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(_install, "_SOURCE", tmp_path)
    assert _install.install_command("train") == "pip install -e '.[train]' (in a clone of the repository)"


def test_error_names_the_extra():
    error = _install.missing_extra("training", "train", "no module accelerate")
    assert isinstance(error, ConfigError)
    assert str(error) == f"training needs the extra `train` (no module accelerate): pip install -e '{ROOT}[train]'"


def test_code_says_pip_install_in_one_place():
    assert [file.name for file in CODE if "pip install" in file.read_text()] == ["_install.py"]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_documents_name_no_published_package(file):
    text = file.read_text()
    assert "pip install slr" not in text
    assert "pip install 'slr" not in text


def test_named_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used = {name for file in CODE for name in re.findall(r'missing_extra\(f?"[^"]+", "(\w+)"', file.read_text())}
    assert used
    assert used <= set(extras)
