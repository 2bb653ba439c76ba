"""The cost of a request is bounded: its validation, and the size of its answer. On a server in its own process."""

import pytest

from tests.hostile import bodies
from tests.server.conftest import KEY


@pytest.fixture(scope="module")
def costs(guarded):
    return bodies.costly_bodies(guarded.url, KEY)


@pytest.mark.parametrize("name", bodies.COSTLY)
def test_validation(costs, name):
    cost = costs[name]
    assert cost.status == 400
    assert cost.response_bytes < 2000
    assert cost.duration_s < 1
    assert cost.liveness_s < 1


def test_large_trace_is_refused(guarded):
    cost = bodies.large_trace(guarded.url, KEY)
    assert cost.status == 400
    assert cost.liveness_s < 1


def test_large_logprobs_are_refused(guarded):
    assert bodies.large_logprobs(guarded.url, KEY, tokens=50).status == 400


@pytest.mark.slow
def test_largest_trace(guarded):
    """The largest trace that is allowed does not hold the event loop."""
    cost = bodies.large_trace(guarded.url, KEY, top_tokens=8)
    assert cost.status == 200
    assert cost.response_bytes > 4 << 20
    assert cost.liveness_s < 1
