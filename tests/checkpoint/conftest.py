"""A checkpoint with a decode adapter, and copies of it to break."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from slr_core.checkpoint.pretrained import PACKAGED
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf

TEXT = {"prompt_prefix": "w1 ", "stop": ["w36"], "max_new_tokens": 5}


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner(decode=True, text=TEXT)


@pytest.fixture(scope="module")
def good(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    made.save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package that brings the tiny Llama as `smollm2`, and an empty cache folder."""
    folder = tmp_path / "package"
    folder.mkdir()
    write_gguf(folder / PACKAGED["smollm2"].file)
    monkeypatch.setenv("SLR_CACHE_DIR", str(tmp_path / "cache"))
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr("slr_core.checkpoint.pretrained.find_spec", lambda name: spec)
    monkeypatch.setattr("slr_core.checkpoint.base_reference.version", lambda name: "1.2")
    return folder
