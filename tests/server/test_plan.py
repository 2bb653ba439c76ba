import pytest

from server.plan import check_limits, count, plan
from server.schemas import GenerateRequest, TraceRequest
from server.settings import Settings
from slr_core.errors import RequestError
from tests import tiny


def planned(reference, body, **settings):
    return plan(reference, GenerateRequest(**body), Settings(**settings))


def test_defaults_are_the_checkpoints(reference):
    (request,) = planned(reference, {"prompt": "w1 w2"})
    assert request == tiny.request(reference, "w1 w2", max_new_tokens=None)


def test_defaults_give_way_to_the_operators_limits(reference):
    (request,) = planned(reference, {"prompt": "w1"}, max_iterations=2, max_new_tokens=3)
    assert (request.loop.max_iterations, request.max_new_tokens) == (2, 3)
    (request,) = planned(reference, {"prompt": "w1"}, max_iterations=0)
    assert (request.loop.max_iterations, request.loop.min_iterations) == (0, 0)
    (request,) = plan(reference, TraceRequest(prompt="w1"), Settings(max_top_tokens=2))
    assert request.top_tokens == 2


def test_samples(reference):
    seeds = [r.sampling.seed for r in planned(reference, {"prompt": ["w1", "w2"], "seed": 5, "n": 2})]
    assert seeds == [5, 6, 5, 6]
    assert [r.sampling.seed for r in planned(reference, {"prompt": "w1", "n": 2})] == [None, None]


@pytest.mark.parametrize(
    ("body", "settings", "param"),
    [
        ({"prompt": ["a", "b"]}, {"max_prompts": 1}, "prompt"),
        ({"n": 3}, {"max_n": 2}, "n"),
        ({"max_iterations": 3}, {"max_iterations": 2}, "max_iterations"),
        ({"min_iterations": 3}, {"max_iterations": 2}, "min_iterations"),
        ({"max_new_tokens": 3}, {"max_new_tokens": 2}, "max_new_tokens"),
        ({"n": 3}, {"max_queue": 2}, "n"),
        ({"prompt": ["a", "b", "c"]}, {"max_queue": 2}, "prompt"),
    ],
)
def test_limits(body, settings, param):
    request = GenerateRequest(**{"prompt": "w1", **body})
    assert count(request) > 0
    check_limits(request, Settings())
    with pytest.raises(RequestError) as error:
        check_limits(request, Settings(**settings))
    assert error.value.param == param


def test_the_loops_own_policy_is_kept():
    strict = tiny.reasoner(loop={"max_iterations": 3, "lora": {"past_end": "error"}})
    with pytest.raises(RequestError) as error:
        planned(strict, {"prompt": "w1", "max_iterations": 4})
    assert error.value.param == "max_iterations"
