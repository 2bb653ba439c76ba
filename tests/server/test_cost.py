"""The cost of a request is bounded: its validation, and the size of its answer. On a server in its own process."""

import pytest

from tests.hostile import bodies
from tests.server.conftest import KEY

LIMIT_S = 4.0
"""Alone it takes well under a second; before there were limits, 6 s and more. Other tests share the processor."""
ITERATIONS = 48
"""As many as fit the tiny model."""


@pytest.fixture(scope="module")
def costs(guarded):
    return bodies.costly_bodies(guarded.url, KEY)


@pytest.mark.parametrize("name", bodies.COSTLY)
def test_validation(costs, name):
    cost = costs[name]
    assert cost.status == 400
    assert cost.response_bytes < 2000
    assert cost.duration_s < LIMIT_S
    assert cost.liveness_s < LIMIT_S


def test_large_trace_is_refused(guarded):
    cost = bodies.large_trace(guarded.url, KEY, iterations=ITERATIONS)
    assert cost.status == 400
    assert "top_tokens: the response may hold" in cost.error
    assert cost.liveness_s < LIMIT_S


def test_large_logprobs_are_refused(guarded):
    cost = bodies.large_logprobs(guarded.url, KEY, tokens=50)
    assert cost.status == 400
    assert "logprobs: the response may hold" in cost.error


@pytest.mark.slow
def test_largest_trace(guarded):
    """The largest trace that is allowed does not hold the event loop."""
    cost = bodies.large_trace(guarded.url, KEY, iterations=ITERATIONS, top_tokens=42)
    assert cost.status == 200
    assert cost.response_bytes > 4 << 20
    assert cost.liveness_s < LIMIT_S


@pytest.mark.slow
def test_long_prompts(guarded):
    """A bystander does not wait for the tokenization of refused megabytes."""
    assert max(bodies.long_prompts(guarded.url, KEY)) < LIMIT_S
