"""A simulation of servers behind a router: arrivals, steps, slots and queues, from the measured cost of a step.

A replica runs one step after another. A step takes each of its running answers one pass forward: first its prompt, then
the iterations of its loop, then its tokens. An answer leaves its slot after its last pass; a waiting answer takes it
before the next step. Everything between the engine and the client is one constant.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Router = Literal["random", "round_robin", "two_choices"]


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: ``fixed_s + row_s * rows + (prompt_s + request_s) * prompts``.

    Attributes:
        fixed_s: of every step.
        row_s: of each answer in it.
        prompt_s: of each answer whose prompt is run in it, on top.
        request_s: of each answer, outside the engine's steps, in which the engine waits: HTTP and tokenization share
            Python's lock with it.
        outside_s: of each answer, while the engine works for others.
    """

    fixed_s: float
    row_s: float
    prompt_s: float
    request_s: float = 0.0
    outside_s: float = 0.0

    def seconds(self, rows: int, prompts: int) -> float:
        """Seconds of a step of ``rows`` answers, of which ``prompts`` run their prompt."""
        return self.fixed_s + self.row_s * rows + (self.prompt_s + self.request_s) * prompts


@dataclass(frozen=True)
class Arrival:
    """A request for one answer.

    Attributes:
        at: seconds from the start.
        iterations: iterations of its loop, unless its budget is reduced.
        tokens: its tokens.
    """

    at: float
    iterations: int
    tokens: int


@dataclass(frozen=True)
class Fleet:
    """Replicas and their limits.

    Attributes:
        replicas: number of servers.
        slots: answers that each runs at once.
        queue: answers that may wait at each; more are refused.
        router: how a request finds its replica. ``two_choices``: the one of two random ones that has fewer answers.
        max_iterations: budget of a loop, which elastic depth reduces.
        elastic_floor: share of the budget that remains when half a queue waits; 1: elastic depth is off.
    """

    replicas: int
    slots: int
    queue: int = 256
    router: Router = "two_choices"
    max_iterations: int = 64
    elastic_floor: float = 1.0


@dataclass
class Prediction:
    """What the clients see. Answers that arrive before the warm-up ends are left out.

    Attributes:
        seconds: from the end of the warm-up to the last arrival.
        latencies: seconds of each answer, in the order in which they end.
        refused: number of refused requests.
        reduced: number of answers whose budget was reduced.
        busy_share: share of the time in which a replica runs steps.
        rows: mean number of answers in a step.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    reduced: int = 0
    busy_share: float = 0.0
    rows: float = 0.0

    @property
    def answers_per_s(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the answers arrived; not a number if there are none."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class _Replica:
    """One server. ``running`` is a heap of (step at whose end the answer is finished, arrival)."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[float, int]] = deque()
        self.running: list[tuple[int, float]] = []
        self.step = 0
        self.busy = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)


def simulate(
    arrivals: Iterable[Arrival], fleet: Fleet, cost: StepCost, *, warm_up_s: float = 0.0, seed: int = 0
) -> Prediction:
    """Run all arrivals to their end.

    Args:
        arrivals: in order of time.
        fleet: the servers.
        cost: of a step of each.
        warm_up_s: arrivals before this second are simulated and not counted.
        seed: of the router.
    """
    replicas = [_Replica() for _ in range(fleet.replicas)]
    choose = _router(fleet.router, replicas, random.Random(seed))
    steps: list[tuple[float, int]] = []
    """Ends of the steps that run: (time, replica)."""
    found = Prediction(0.0)
    busy_s, step_count, row_count, last = 0.0, 0, 0, 0.0

    def start_step(number: int, now: float) -> None:
        nonlocal busy_s, step_count, row_count
        replica, prompts = replicas[number], 0
        while replica.waiting and len(replica.running) < fleet.slots:
            at, passes = replica.waiting.popleft()
            heapq.heappush(replica.running, (replica.step + passes, at))
            prompts += 1
        replica.busy = bool(replica.running)
        if replica.busy:
            replica.step += 1
            took = cost.seconds(len(replica.running), prompts)
            busy_s, step_count, row_count = busy_s + took, step_count + 1, row_count + len(replica.running)
            heapq.heappush(steps, (now + took, number))

    def end_step() -> None:
        now, number = heapq.heappop(steps)
        replica = replicas[number]
        while replica.running and replica.running[0][0] <= replica.step:
            _, at = heapq.heappop(replica.running)
            if at >= warm_up_s:
                found.latencies.append(now - at + cost.outside_s)
        start_step(number, now)

    for arrival in arrivals:
        while steps and steps[0][0] <= arrival.at:
            end_step()
        last = arrival.at
        number = choose()
        replica = replicas[number]
        if len(replica.waiting) >= fleet.queue:
            found.refused += arrival.at >= warm_up_s
            continue
        iterations = min(arrival.iterations, _budget(fleet, len(replica.waiting)))
        found.reduced += iterations < arrival.iterations and arrival.at >= warm_up_s
        replica.waiting.append((arrival.at, 1 + iterations + max(0, arrival.tokens - 1)))
        if not replica.busy:
            start_step(number, arrival.at)
    ended = last
    while steps:
        ended = max(ended, steps[0][0])
        end_step()
    found.seconds = max(last - warm_up_s, 1e-9)
    found.busy_share = busy_s / (fleet.replicas * ended) if ended else 0.0
    found.rows = row_count / max(1, step_count)
    return found


def _budget(fleet: Fleet, waiting: int) -> int:
    """As :meth:`slr_server.admission.Admission.depth`."""
    depth = 1 - (1 - fleet.elastic_floor) * min(1.0, 2 * waiting / fleet.queue)
    return math.ceil(depth * fleet.max_iterations)


def _router(kind: Router, replicas: Sequence[_Replica], rng: random.Random) -> Callable[[], int]:
    count, turn = len(replicas), -1

    def round_robin() -> int:
        nonlocal turn
        turn = (turn + 1) % count
        return turn

    def two_choices() -> int:
        first, second = int(rng.random() * count), int(rng.random() * count)
        return first if replicas[first].load <= replicas[second].load else second

    return {"random": lambda: int(rng.random() * count), "round_robin": round_robin, "two_choices": two_choices}[kind]


def poisson(rate: float, seconds: float, exits: dict[int, float], tokens: int, seed: int = 0) -> Iterator[Arrival]:
    """Requests at random times.

    Args:
        rate: requests per second.
        seconds: for how long.
        exits: relative frequency of each number of iterations.
        tokens: of each answer.
        seed: of times and iterations.
    """
    rng, at = random.Random(seed), 0.0
    depths, weights = list(exits), list(exits.values())
    while (at := at + rng.expovariate(rate)) < seconds:
        yield Arrival(at, rng.choices(depths, weights)[0], tokens)


def replicas_for(
    rate: float, fleet: Callable[[int], Fleet], cost: StepCost, exits: dict[int, float], tokens: int, p99_s: float
) -> tuple[Fleet, Prediction]:
    """The smallest fleet that answers ``rate`` requests per second, refuses none and keeps p99 within ``p99_s``.

    Args:
        rate: requests per second.
        fleet: makes a fleet of so many replicas.
        cost: of a step.
        exits: see :func:`poisson`.
        tokens: of each answer.
        p99_s: seconds.
    """
    # Below the work of the arrivals at full batches, no fleet keeps up.
    slots = fleet(1).slots
    passes = sum(n * w for n, w in exits.items()) / sum(exits.values()) + tokens
    most = 1 / (passes * (cost.fixed_s / slots + cost.row_s) + cost.prompt_s + cost.request_s)
    low = max(1, math.ceil(rate / most))
    window = max(3.0, min(30.0, 60_000 / rate))

    def run(count: int) -> tuple[Fleet, Prediction]:
        made = fleet(count)
        arrivals = poisson(rate, 1.5 * window, exits, tokens)
        return made, simulate(arrivals, made, cost, warm_up_s=window / 2)

    count = low
    while True:
        made, found = run(count)
        if not found.refused and found.quantile(0.99) <= p99_s:
            return made, found
        if count > 10 * low:
            raise ValueError(f"a p99 of {p99_s:g} s is out of reach: a lone answer takes longer")
        count = max(count + 1, round(1.05 * count))
