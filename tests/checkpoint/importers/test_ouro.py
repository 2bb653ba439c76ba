"""Ouro: gates and exits of its own code, at full depth and with a threshold; what a folder must hold."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.engine.engine import Engine
from slr_core.errors import SLRError
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.loop.convergence import ExitRule
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Tokens
from tests import tiny


@pytest.fixture(scope="module")
def recorded(shared_data):
    folder = shared_data / "peers" / "ouro"
    if not folder.is_dir():
        pytest.skip("the recorded checkpoints are not here")
    return folder


def convert(checkpoint, out, **options):
    import_checkpoint(Import("ouro", str(checkpoint), None, out, ImportOptions(**options)))
    return load_checkpoint(LatentReasoner, out)


@pytest.fixture(scope="module")
def imported(recorded, tmp_path_factory):
    return convert(recorded / "checkpoint", tmp_path_factory.mktemp("ouro") / "out")


@pytest.fixture(scope="module")
def expected(recorded):
    return json.loads((recorded / "expected.json").read_text())


def p_halt(imported, ids):
    """The gate after each iteration at every position, ``[loops, positions]``."""
    with torch.inference_mode():
        context = imported.encode(torch.tensor([ids]), torch.ones(1, len(ids)))
        states = imported.unroll(context, 4)[0, 1:]
        return imported.halting(states[:, :, None], None)


def test_gates(recorded, imported, expected):
    thoughts = load_file(recorded / "thoughts.safetensors")
    for number, case in enumerate(expected["cases"]):
        gates = p_halt(imported, [*case["prompt_ids"], *case["tokens"][:-1]])
        wanted = thoughts[f"{number}.gate"]
        torch.testing.assert_close(gates[:, : wanted.shape[1]], wanted.sigmoid(), rtol=0, atol=1e-4)


def exits(gates, threshold, guard):
    """Each position's exit by the criterion `survival`."""
    found = []
    settings = LoopParams(max_iterations=4, min_iterations=1, criterion="survival", threshold=threshold, patience=1)
    for column in gates.T.tolist():
        rule, survival = ExitRule(settings, guard), 1.0
        for t, p in enumerate(column, start=1):
            survival *= 1 - p
            if rule.update(t, distance=survival, change=None, norm=1.0) is not None:
                found.append(t)
                break
    return found


@pytest.mark.slow
def test_exits(imported, expected):
    """With a threshold, a token exits where the peer's rule reads it, given earlier tokens that ran all loops."""
    guard, compared = imported.config.loop.guard, 0
    for variant in expected["variants"]:
        q = variant["settings"].get("early_exit_threshold")
        if q is None:
            continue
        for case in variant["cases"]:
            fed = [*case["prompt_ids"], *case["tokens"][:-1]]
            first = len(case["prompt_ids"]) - 1
            assert exits(p_halt(imported, fed)[:, first:], 1 - q, guard) == [step + 1 for step in case["exit_steps"]]
            loop = LoopParams(criterion="survival", threshold=1 - q)
            (result,) = generate(
                imported, [prepare(imported, Tokens(tuple(case["prompt_ids"])), loop, max_new_tokens=24)]
            )
            # The prompt runs all loops in both.
            assert result.iterations == case["exit_steps"][0] + 1
            assert result.token_ids[0] == case["tokens"][0]
            assert result.forward_passes == 4 + sum(result.iterations_per_token[1:])
            assert min(result.iterations_per_token) < 4
            compared += 1
    assert compared == 16


def test_fewer_loops(recorded, expected, tmp_path):
    """``early_exit_step`` of the configuration: the state of that loop is read."""
    (variant,) = [v for v in expected["variants"] if "early_exit_step" in v["settings"]]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(recorded / "checkpoint", checkpoint)
    checkpoint.chmod(0o755)
    (checkpoint / "config.json").chmod(0o644)
    tiny.edit_json(checkpoint / "config.json", **variant["settings"])
    made = convert(checkpoint, tmp_path / "out")
    requests = [prepare(made, Tokens(tuple(case["prompt_ids"])), max_new_tokens=24) for case in variant["cases"]]
    assert [list(r.token_ids) for r in generate(made, requests)] == [case["tokens"] for case in variant["cases"]]


def test_engine_stops_early(imported, expected):
    loop = LoopParams(criterion="survival", threshold=0.3)
    requests = [prepare(imported, case["prompt"], loop, max_new_tokens=8) for case in expected["cases"]]
    with Engine(imported, slots=5, threads=1) as engine:
        results = [future.result() for future in [engine.submit(request) for request in requests]]
    for result, alone in zip(results, generate(imported, requests), strict=True):
        assert (result.token_ids, result.iterations_per_token) == (alone.token_ids, alone.iterations_per_token)


DAMAGED = {
    "type": ({"model_type": "llama"}, "model_type must be ouro"),
    "loops": ({"total_ut_steps": 0}, "total_ut_steps must be a number from 1 to 64"),
    "step": ({"early_exit_step": 4}, "early_exit_step must be a number from 0 to 3"),
    "threshold": ({"early_exit_threshold": 2}, "early_exit_threshold must be a number from 0 to 1"),
    "window": ({"use_sliding_window": True}, "sliding windows"),
    "sizes": ({"hidden_size": None}, "hidden_size must be a positive number"),
    "other sizes": ({"intermediate_size": 96}, "has shape"),
    "option": ({}, "--iterations is 3, and the checkpoint's files say 4"),
    "gate": ({}, r"it has no tensor model\.early_exit_gate\.weight"),
    "extra": ({}, "1 tensors are unknown, such as model"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, recorded, tmp_path):
    changes, message = DAMAGED[case]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in (recorded / "checkpoint").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    tiny.edit_json(checkpoint / "config.json", **changes)
    weights = load_file(checkpoint / "model.safetensors")
    if case == "gate":
        del weights["model.early_exit_gate.weight"]
    if case == "extra":
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(SLRError, match=message):
        convert(checkpoint, tmp_path / "out", **({"iterations": 3} if case == "option" else {}))
    assert not (tmp_path / "out").exists()
