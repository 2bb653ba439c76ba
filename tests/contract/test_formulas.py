"""The reference gives what the formulas give: every part, architecture and workspace, derived again from the files."""

import itertools
from typing import get_args

import pytest
import torch

from slr_core.config import Criterion
from slr_core.generation.reference import generate, prefix_joins_loop
from tests import tiny
from tests.contract.derivation import Parts, derive

FIXED = {"max_iterations": 5, "criterion": "fixed"}
DECODER = {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}
PREFIX = {"answer_prefix": "w7 w8"}
# What each case changes in the tiny loop, of which request. Between them they name every choice of every part.
CASES = {
    "default": ({}, FIXED, {}),
    "bare": (
        {
            "projection": {"kind": "identity"},
            "timestep": {"kind": "none"},
            "residual": {"source": "none"},
            "lora": {"kind": "none"},
        },
        {"max_iterations": 7, "criterion": "argmax_stable", "patience": 2},
        {},
    ),
    "sinusoidal-concat, linear, initial-convex-norm, cycle, decode adapter": (
        {
            "projection": {"kind": "linear"},
            "timestep": {"kind": "sinusoidal", "combine": "concat"},
            "residual": {"source": "initial", "mix": "convex", "alpha": 0.7, "norm": True},
            "lora": {"past_end": "cycle", "decode_rank": 2},
        },
        {"max_iterations": 5, "criterion": "kl", "threshold": 0.003},
        PREFIX,
    ),
    "learned-concat-noise, mlp, previous-add, shared adapter": (
        {
            "projection": {"kind": "mlp"},
            "timestep": {"combine": "concat", "noise_level": True},
            "residual": {"mix": "add", "scale": -0.4},
            "lora": {"kind": "shared"},
        },
        {"max_iterations": 6, "min_iterations": 3, "criterion": "entropy_change", "threshold": 0.5},
        {},
    ),
    "sinusoidal-noise, initial-gated, unequal ranks, no past end, decode adapter, halting": (
        {
            "timestep": {"kind": "sinusoidal", "noise_level": True},
            "residual": {"source": "initial", "alpha": 0.6, "norm": True},
            "lora": {"rank": [1, 4, 2], "past_end": "error", "decode_rank": 3},
            "max_iterations": 3,
            "halting_head": True,
        },
        {"max_iterations": 3, "criterion": "learned", "threshold": 0.9},
        PREFIX,
    ),
    "expected embedding, until the end token": (
        {"projection": {"kind": "expected_embedding"}, "convergence": {"end_token_id": 7}},
        {"max_iterations": 6, "criterion": "end_token", "threshold": 0.97},
        PREFIX,
    ),
    "no residual, halting by survival": (
        {"residual": {"source": "none"}, "halting_head": True},
        {"max_iterations": 6, "criterion": "survival", "threshold": 0.1},
        {},
    ),
    "noise alone, previous-convex, latent decoder": (
        {
            "timestep": {"kind": "none", "noise_level": True},
            "residual": {"mix": "convex", "alpha": 0.3},
            "lora": {"target_modules": "all"},
            "decoder": DECODER,
        },
        {"max_iterations": 8, "criterion": "relative_change", "threshold": 0.6, "patience": 2},
        PREFIX,
    ),
    "initial-add, latent decoder for thoughts alone": (
        {"residual": {"source": "initial", "mix": "add"}, "decoder": {"latent_decoder": tiny.LATENT_DECODER}},
        {"max_iterations": 5, "criterion": "cosine", "threshold": 0.05},
        {},
    ),
    "narrow mlp without norm, suppressed tokens": (
        {"projection": {"kind": "mlp", "inner_size": 20, "norm": False}, "residual": {"source": "none"}},
        FIXED,
        {"suppressed_token_ids": list(range(2, 30))},
    ),
    "an adapter that covers all": (
        {"lora": {"kind": "shared", "covers": "all"}, "projection": {"kind": "identity"}},
        FIXED,
        PREFIX,
    ),
    "an adapter that covers all, no iteration": (
        {"lora": {"kind": "shared", "covers": "all"}},
        {"max_iterations": 0},
        PREFIX,
    ),
    "no iteration": ({"lora": {"decode_rank": 2}, "decoder": DECODER}, {"max_iterations": 0}, PREFIX),
}
WORKSPACES = {**tiny.WORKSPACES, "shifted": {**tiny.WORKSPACES["block"], "feedback": "shifted"}}
ATTENTION = {"llama": ["q_proj", "o_proj"], "gpt2": ["c_attn"]}


def loop_of(name, kind, workspace):
    loop = {**CASES[name][0], **WORKSPACES[workspace]}
    if loop.get("lora", {}).get("target_modules") == "all":
        loop["lora"] = {"target_modules": ATTENTION.get(kind, ATTENTION["llama"])}
    return loop


def product():
    """Every architecture, workspace and case; each workspace and case on one architecture in turn is quick enough."""
    for (i, workspace), (j, name) in itertools.product(enumerate(WORKSPACES), enumerate(CASES)):
        for kind in tiny.KINDS:
            marks = () if kind == tiny.KINDS[(i + j) % len(tiny.KINDS)] else pytest.mark.slow
            yield pytest.param(kind, workspace, name, marks=marks)


def test_every_criterion():
    assert {settings["criterion"] for _, settings, _ in CASES.values() if "criterion" in settings} == {
        *get_args(Criterion)
    }


@pytest.mark.parametrize(("kind", "workspace", "name"), list(product()))
def test_the_loop_is_the_formulas(kind, workspace, name, tmp_path):
    _, settings, text = CASES[name]
    made = tiny.reasoner(kind, loop_of(name, kind, workspace), text=text)
    made.save_pretrained(str(tmp_path))
    request = tiny.request(made, tiny.PROMPTS[3], settings, max_new_tokens=5, trace=True, include_states=True)
    with tiny.passes(made) as passes:
        (ours,) = generate(made, [request])
    derived = derive(tmp_path, list(request.prompt_ids), request.loop, 5)

    assert (ours.iterations, ours.exit_reason) == (len(derived.states) - 1, derived.exit_reason)
    torch.testing.assert_close(ours.states, torch.stack(derived.states), rtol=1e-5, atol=1e-5)
    assert list(ours.token_ids) == derived.tokens
    assert passes == [(adapter, [positions]) for adapter, positions in derived.passes]
    joined = prefix_joins_loop(made, request)  # the reference runs such a prefix in a pass of its own
    assert len(passes) - joined == ours.forward_passes == lone_passes(made, ours, "answer_prefix" in text) - joined
    assert len(ours.records) == len(derived.records)
    for record, expected in zip(ours.records, derived.records, strict=True):
        for key, value in expected.items():
            assert getattr(record, key) == (
                pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            ), key
    if made.decoder is not None:
        parts = Parts(tmp_path)
        with torch.inference_mode():
            thoughts = [parts.thought(h) for h in derived.states[1:]]
        said = [made.tokenizer.decode(ids, skip_special_tokens=True) for ids in thoughts]
        assert [record.thought for record in ours.records] == said


def lone_passes(made, result, prefixed):
    """The row of the design's table, for one request."""
    t, tokens = result.iterations, len(result.token_ids)
    loop = {"append": 1 + t, "block": 1 + t, "prompt": t}[made.config.loop.workspace]
    if made.answers_from_states and t:
        return loop
    closing = {"append": 0, "block": int(t > 0), "prompt": 1}[made.config.loop.workspace]
    return loop + closing + prefixed + tokens - 1
