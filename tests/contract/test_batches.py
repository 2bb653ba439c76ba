"""A batch is its rows: for every architecture and workspace, whatever the rows want and wherever the padding is."""

from itertools import pairwise

import pytest
import torch

from slr_core.generation.reference import generate
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams, SamplingParams
from tests import tiny
from tests.contract.conftest import EVERY, in_turn
from tests.contract.mix import MEASURES, MIXED, facts, mixed, near

LATENT = {"decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}}
NOISE = {"timestep": {"kind": "sinusoidal", "noise_level": True}, "residual": {"source": "initial", "norm": True}}
PREFIX = {"text": {"answer_prefix": "w7 w8"}}
VARIANTS = {
    "plain": lambda kind, loop: tiny.reasoner(kind, loop),
    "decode-adapter": lambda kind, loop: tiny.reasoner(kind, loop, decode=True, **PREFIX),
    "latent-decoder": lambda kind, loop: tiny.reasoner(kind, {**LATENT, **loop}),
    "noise-level": lambda kind, loop: tiny.reasoner(kind, {**NOISE, **loop}, **PREFIX),
}
# Every architecture loops in every workspace; the other ways to end a batch are the same code for all of them.
CASES = [
    in_turn(kind, workspace, variant, turn=turn)
    for kind, workspace in EVERY
    for turn, variant in enumerate(VARIANTS if kind == "llama" else ["decode-adapter"])
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request):
    kind, workspace, variant = request.param
    return VARIANTS[variant](kind, tiny.WORKSPACES[workspace])


@pytest.fixture(scope="module")
def alone(made):
    """Each request of the mix by itself."""
    return [generate(made, [request])[0] for request in mixed(made)]


def near_a_threshold(result, settings):
    """Whether rounding could decide an exit; the other criteria are whole numbers."""
    values = [getattr(record, settings.criterion, None) for record in result.records]
    if settings.criterion == "entropy_change":
        values = [abs(b - a) for a, b in pairwise(record.entropy for record in result.records)]
    return any(value is not None and abs(value - settings.threshold) < 1e-3 * settings.threshold for value in values)


def test_a_batch_gives_each_row_what_it_gets_alone(made, alone):
    requests = mixed(made)
    together = generate(made, requests)

    # The mix must really be one, and no row may sit so near its threshold that rounding decides.
    assert {"converged", "max_iterations"} == {result.exit_reason for result in alone}
    assert len({result.iterations for result in alone}) >= 4
    assert len({result.token_ids for result in alone}) >= 5
    assert not any(near_a_threshold(result, r.loop) for result, r in zip(alone, requests, strict=True))

    assert [facts(result) for result in together] == [facts(result) for result in alone]
    for a, b in zip(together, alone, strict=True):
        assert near(a.final_change, b.final_change)
        assert [record.thought for record in a.records] == [record.thought for record in b.records]
        for record, other in zip(a.records, b.records, strict=True):
            for name in MEASURES:
                assert near(getattr(record, name), getattr(other, name)), name


def test_states_in_a_batch_are_those_of_rows_alone(made):
    settings = [LoopParams(**loop).resolve(made.config) for loop in MIXED]
    with torch.inference_mode():
        together = loop_until_exit(made, made.encode(*tiny.batch(tiny.PROMPTS)), settings)
        for i, prompt in enumerate(tiny.PROMPTS):
            alone = loop_until_exit(made, made.encode(*tiny.batch([prompt])), [settings[i]])
            assert together.iterations[i] == alone.iterations[0]
            torch.testing.assert_close(together.states[i], alone.states[0], rtol=1e-5, atol=1e-5)
            width = made.workspace.width(len(tiny.ids(prompt)))
            assert together.states[i].shape == (together.iterations[i] + 1, width, 32)


def test_sampled_tokens_do_not_depend_on_the_batch(made):
    sampling = [SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=seed) for seed in range(8)]
    requests = [
        tiny.request(made, prompt, loop, sampling=own)
        for prompt, loop, own in zip(tiny.PROMPTS, MIXED, sampling, strict=True)
    ]
    together = generate(made, requests)
    assert [facts(r) for r in together] == [facts(generate(made, [request])[0]) for request in requests]


def test_the_order_of_a_batch_changes_nothing(made, alone):
    requests, order = mixed(made), [5, 2, 7, 0, 3, 1, 6, 4]
    shuffled = generate(made, [requests[i] for i in order])
    assert [facts(result) for result in shuffled] == [facts(alone[i]) for i in order]


def test_left_padding_equals_right_padding(made):
    settings = [LoopParams(**loop).resolve(made.config) for loop in MIXED]
    looped = torch.tensor([s.max_iterations > 0 for s in settings])
    tokens, present = tiny.batch([tiny.words(1, 2), *[tiny.words(4, 5, 6)] * 7])
    outputs, answers = [], []
    with torch.inference_mode():
        for side in ("left", "right"):
            outputs.append(loop_until_exit(made, made.encode(*tiny.batch(tiny.PROMPTS, side)), settings))
            first = made.head(outputs[-1].context.state)
            rest = made.answer_logits(outputs[-1].context, tokens, present.bool(), looped)
            answers.append(torch.cat([first, rest[present.bool()]]))
    left, right = outputs
    assert (left.iterations, left.exit_reasons) == (right.iterations, right.exit_reasons)
    for a, b in zip(left.states, right.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
