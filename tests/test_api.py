"""The public names of ``slr_core``."""

import subprocess
import sys
import typing

import pytest

import slr_core
from tests.test_structure import SERVE_ONLY

NAMES = """
AsyncClient CheckpointError Client ConfigError DataError DeadlineError Engine EngineError Event FinishedEvent
IterationEvent IterationRecord LatentReasoner LoopParams ReasonerOutput Request RequestError ResolvedLoopParams Result
SLRConfig SLRError SamplingParams Stability Timings TokenEvent TokenScore Tokens TrainingError __version__
""".split()
LIGHT = [name for name in NAMES if name not in ("Engine", "Event", "LatentReasoner", "ReasonerOutput")]
LIGHT = [name for name in LIGHT if not name.endswith("Event")]
"""Names that need neither torch nor transformers: those of a client, and of the data that goes in and out."""


def test_exact_list():
    assert slr_core.__all__ == NAMES == sorted(NAMES)
    assert set(NAMES) <= set(dir(slr_core))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("__version__", "Event")])
def test_classes_are_documented(name):
    public = getattr(slr_core, name)
    assert isinstance(public, type)
    assert public.__name__ == name
    assert "__doc__" in vars(public)
    assert len(public.__doc__) > 20
    assert not public.__doc__.startswith(f"{name}(")  # what dataclasses write where there is none


def test_star_import():
    names = {}
    exec("from slr_core import *", names)
    assert set(NAMES) <= names.keys()
    assert set(typing.get_args(names["Event"])) == {names[kind] for kind in NAMES if kind.endswith("nEvent")} | {
        names["FinishedEvent"]
    }


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'engine_of_doom'"):
        _ = slr_core.engine_of_doom


def test_import_is_light():
    """Neither the package nor its light names import torch, transformers or a package of the extra ``serve``."""
    heavy = ("torch", "transformers", *SERVE_ONLY)
    code = f"import sys\nfrom slr_core import {', '.join(LIGHT)}\nprint(sorted({{*{heavy!r}}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
