"""Elastic depth: the iteration budget shrinks with the queue, down to a floor, before requests are refused."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slr_server.admission import Admission, reduce_budget
from tests import tiny
from tests.server.conftest import sample


def depth(waiting, floor=0.5, limit=10):
    return Admission(limit, lambda most: waiting).depth(floor, 1)


def test_depth_follows_the_queue():
    assert [depth(waiting) for waiting in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert depth(10) == depth(5) == 0.5, "the floor is reached when the queue is half full"
    assert depth(10, floor=1.0) == 1.0, "a floor of 1 turns it off"


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0.01, 1))
def test_depth_is_monotonic_and_bounded(limit, waiting, floor):
    now, more = depth(waiting, floor, limit), depth(waiting + 1, floor, limit)
    assert floor - 1e-9 <= more <= now <= 1


@given(st.integers(0, 50), st.data(), st.floats(0.01, 1))
def test_reduced_budget_keeps_minimum(most, data, share):
    least = data.draw(st.integers(0, most))
    request = tiny.request(REASONER, "w1", {"max_iterations": most, "min_iterations": least})
    given_ = reduce_budget(request, share)
    assert least <= given_.loop.max_iterations <= most
    assert given_.loop.max_iterations >= share * most
    assert (given_ is request) == (given_.loop.max_iterations == most)
    assert replace(given_, loop=request.loop) == request, "nothing else changes"


REASONER = tiny.reasoner()
BODY = {"prompt": "w1 w2", "max_new_tokens": 2, "max_iterations": 8, "convergence": {"criterion": "fixed"}}


def test_budget_reduced_under_load(gated, gate):
    client = gated(max_queue=4)
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json=BODY)
        assert gate.reached.wait(20)
        waiting = [engine.submit(tiny.request(engine.reasoner, "w1")) for _ in range(3)]
        plain = pool.submit(client.post, "/generate", json=BODY)
        while engine.queued < 4:
            pass
        gate.opened.set()
        (unhurried,), (hurried,) = (r.result(20).json()["results"] for r in (first, plain))
        for future in waiting:
            future.result(20)
    assert (unhurried["iterations"], unhurried["budget_reduced"]) == (8, False)
    assert (hurried["iterations"], hurried["budget_reduced"]) == (4, True)
    assert sample(client, "slr_budget_reductions_total") == 1


def test_elastic_depth_off(gated, gate):
    client = gated(max_queue=4, elastic_floor=1.0)
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json=BODY)
        assert gate.reached.wait(20)
        waiting = [engine.submit(tiny.request(engine.reasoner, "w1")) for _ in range(3)]
        last = pool.submit(client.post, "/generate", json=BODY)
        while engine.queued < 3:
            pass
        gate.opened.set()
        assert first.result(20).status_code == 200
        (result,) = last.result(20).json()["results"]
        for future in waiting:
            future.result(20)
    assert (result["iterations"], result["budget_reduced"]) == (8, False)


def test_large_request_does_not_reduce_others(gated, gate):
    client = gated(max_queue=32)
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        large = pool.submit(client.post, "/generate", json={**BODY, "n": 12})
        assert gate.reached.wait(20)
        while engine.queued < 10:
            pass
        single = pool.submit(client.post, "/generate", json=BODY)
        while engine.queued < 11:
            pass
        as_large = pool.submit(client.post, "/generate", json={**BODY, "n": 12})
        while engine.queued < 23:
            pass
        gate.opened.set()
        first, bystander, second = (r.result(20).json()["results"] for r in (large, single, as_large))
    assert {result["iterations"] for result in (*first, *bystander)} == {8}
    assert {result["iterations"] for result in second} <= {5, 6}, "it waits for 11 or 12, of 32"
