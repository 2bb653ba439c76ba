import json
import math

import pytest
import torch

from slr_core.generation.reference import generate
from slr_core.types import finite_or_none
from tests import tiny

LOOP = {"max_iterations": 3, "criterion": "fixed"}
LATENT = {"decoder": {"latent_decoder": tiny.LATENT_DECODER}}


def answer(made, **options):
    return generate(made, [tiny.request(made, tiny.PROMPTS[1], LOOP, **options)])[0]


def test_what_is_not_finite_is_undefined():
    assert [finite_or_none(x) for x in (1.5, 0.0, None, math.nan, math.inf, -math.inf)] == [1.5, 0.0, *[None] * 4]


def test_result_to_dict():
    result = answer(tiny.reasoner())
    shown = result.to_dict()
    assert json.loads(json.dumps(shown)) == {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "iterations": 3,
        "exit_reason": "max_iterations",
        "final_change": result.final_change,
        "usage": {"prompt_tokens": 5, "completion_tokens": len(result.token_ids), "forward_passes": 9},
        "timings": vars(result.timings),
    }
    assert list(shown["timings"]) == ["queue_s", "prefill_s", "loop_s", "decode_s", "total_s"]


def test_trace_to_dict():
    result = answer(tiny.reasoner(), trace=True, top_tokens=2, include_states=True)
    shown = json.loads(json.dumps(result.to_dict(trace=True)))
    assert shown["stability"] == vars(result.stability)
    assert [step["t"] for step in shown["trace"]] == [1, 2, 3]
    for step, record in zip(shown["trace"], result.records, strict=True):
        tops = [{"token": token, "prob": prob} for token, prob in record.top_tokens]
        assert step == {name: value for name, value in vars(record).items() if name != "thought"} | {"top_tokens": tops}


def test_thoughts_are_shown_where_there_are_some():
    shown = answer(tiny.reasoner(loop=LATENT), trace=True).to_dict(trace=True)
    assert all(isinstance(step["thought"], str) for step in shown["trace"])


@pytest.mark.parametrize(("included", "asked"), [(True, True), (True, False), (False, True)])
def test_states_are_shown_on_request(included, asked):
    result = answer(tiny.reasoner(loop={"workspace": "block", "block_size": 2}), include_states=included)
    shown = result.to_dict(trace=True, states=asked)["trace"]
    if included and asked:
        torch.testing.assert_close(torch.tensor([step["state"] for step in shown]), result.states[1:])
    else:
        assert all("state" not in step for step in shown)


def test_values_that_are_not_finite_are_null():
    record = answer(tiny.reasoner()).records[0]
    state = torch.tensor([[1.0, math.inf], [math.nan, -2.0]])
    assert record.to_dict(state)["state"] == [[1.0, None], [None, -2.0]]
