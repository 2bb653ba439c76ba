"""The simulation of a fleet: arithmetic by hand, and queueing theory."""

import pytest

from benchmarks.scaling import SLOTS, ClosedLoad, Work, fit
from benchmarks.simulator import Arrival, Fleet, StepCost, poisson, replicas_for, simulate

COST = StepCost(0.010, 0.002, 0.005, outside_s=0.001)


def test_lone_answer():
    """Prompt, 3 iterations, 2 tokens of which the loop's last state gives the first: 5 passes of one row."""
    found = simulate([Arrival(1.0, 3, 2)], Fleet(1, 4), COST)
    assert found.latencies == pytest.approx([5 * 0.012 + 0.005 + 0.001])
    assert found.rows == 1


def test_shared_steps():
    """The second one joins at the end of the first one's first step, and shares two of its steps."""
    found = simulate([Arrival(0.0, 1, 2), Arrival(0.001, 1, 2)], Fleet(1, 4), COST)
    first = 0.017 + (0.014 + 0.005) + 0.014
    assert found.latencies == pytest.approx([first + 0.001, first - 0.001 + 0.012 + 0.001])


def test_request_cost():
    """It delays the answers of others, the time outside does not."""
    both = [Arrival(0.0, 1, 2), Arrival(0.001, 1, 2)]
    first, second = simulate(both, Fleet(1, 4), StepCost(0.010, 0.002, 0.005)).latencies
    slower = simulate(both, Fleet(1, 4), StepCost(0.010, 0.002, 0.005, request_s=0.003, outside_s=0.1)).latencies
    assert slower == pytest.approx([first + 0.006 + 0.1, second + 0.006 + 0.1])


def test_calibration():
    """The cost of a step is found again from loads that have it exactly."""
    work, loads = ((100, 100, 9), (80, 300, 12), (50, 700, 40), (40, 640, 70)), []
    for clients, (steps, rows, answers) in enumerate(work, SLOTS - 2):
        busy = 0.010 * steps + 0.002 * rows + 0.005 * answers
        idle = 0.003 * answers if clients >= SLOTS else 1.0
        loads.append(ClosedLoad(clients, Work(busy + idle, steps, rows, busy, answers), outside_s=0.008))
    found = fit(loads)
    expected = StepCost(0.010, 0.002, 0.005, request_s=0.003, outside_s=0.005)
    assert vars(found) == pytest.approx(vars(expected))


def test_slots_and_refusals():
    many = [Arrival(0.0, 0, 1)] * 6
    found = simulate(many, Fleet(1, slots=2, queue=3), COST)
    # The first one starts at once; three wait; the other two are refused.
    assert len(found.latencies) == 4
    assert found.refused == 2
    assert found.rows == pytest.approx(4 / 3)


def test_elastic_depth():
    many = [Arrival(0.0, 10, 1)] * 9
    fleet = Fleet(1, slots=1, queue=8, max_iterations=10, elastic_floor=0.5)
    found = simulate(many, fleet, COST)
    assert found.reduced == 7
    assert max(found.latencies) < max(simulate(many, Fleet(1, slots=1, queue=8), COST).latencies)


def test_md1_queue():
    """One slot and one pass an answer are an M/D/1 queue, whose mean wait is known."""
    cost, load = StepCost(0.01, 0.0, 0.0), 0.7
    found = simulate(poisson(load / 0.01, 400, {0: 1.0}, 1), Fleet(1, slots=1, queue=10_000), cost, warm_up_s=10)
    wait = load * 0.01 / (2 * (1 - load))
    assert sum(found.latencies) / len(found.latencies) == pytest.approx(0.01 + wait, rel=0.05)
    assert found.busy_share == pytest.approx(load, rel=0.03)


def test_routers():
    p99 = {
        router: simulate(poisson(600, 20, {4: 1.0, 16: 1.0}, 2), Fleet(20, 8, router=router), COST).quantile(0.99)
        for router in ("random", "two_choices")
    }
    assert p99["two_choices"] < p99["random"]


def test_replicas_for():
    made, found = replicas_for(200, lambda count: Fleet(count, 8), COST, {8: 1.0}, 2, p99_s=0.5)
    assert found.quantile(0.99) <= 0.5
    fewer = simulate(poisson(200, 45, {8: 1.0}, 2), Fleet(made.replicas - 1, 8), COST, warm_up_s=15)
    assert fewer.quantile(0.99) > 0.5 or fewer.refused
    with pytest.raises(ValueError, match="out of reach"):
        replicas_for(20, lambda count: Fleet(count, 8), COST, {8: 1.0}, 2, p99_s=0.01)
