"""Settings for the whole suite: no network, one thread, no time limits inside property tests. The command line."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from slr_core.reasoner import LatentReasoner

settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_collection() -> None:
    """Set up the libraries where tests run. The controller of pytest-xdist does not need to import them."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting the imported modules again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data files beside the repository; tests that need them are skipped elsewhere."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data files are not here")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of SmolLM2-135M-Instruct, from the package that brings it."""
    from importlib.util import find_spec

    from slr_core.checkpoint.init import init_checkpoint
    from slr_core.checkpoint.pretrained import PACKAGED

    if find_spec(PACKAGED["smollm2"].module) is None:
        pytest.skip("the extra smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2") / "fresh"
    init_checkpoint("smollm2", folder)
    return folder


# -- the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> LatentReasoner:
    """A model that reads ProsQA and knows nothing."""
    from slr_core.training.build import build
    from tests import tiny
    from tests.training.recipe import recipe

    reasoner = build(recipe())
    tiny.shake(reasoner)
    return reasoner.eval()


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> str:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    made.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as installed: its exit code, output and errors."""
    from slr_core import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slr", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
