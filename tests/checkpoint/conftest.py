"""A checkpoint with a decode adapter, and copies of it to break."""

import shutil
from pathlib import Path

import pytest

from tests import tiny

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
