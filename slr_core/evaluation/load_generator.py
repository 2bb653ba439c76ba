"""Load for a server: questions of mixed difficulty over HTTP, and what came of them.

Closed: so many clients, each asking again once it was answered, as a batch job does; a slow server is asked less.
Open: requests arrive at random, at a rate that does not care how the server does, as the public does. A latency is
counted from the moment the request was due: a generator that falls behind must not flatter the server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import httpx

from slr_core.errors import ConfigError, EngineError
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
OK, NO_ANSWER, UNREACHABLE = "200", "no answer", "unreachable"


@dataclass(frozen=True)
class LoadPlan:
    """What a server is to be asked.

    Attributes:
        url: where it listens.
        duration_s: seconds in which requests are sent; those under way are waited for.
        concurrency: clients of a closed load.
        rate: requests a second of an open load; ``None``: the load is closed.
        hops: difficulties of the ProsQA questions, drawn alike.
        seed: of questions and arrivals.
        api_key: bearer key, where the server wants one.
        timeout_s: how long an answer is waited for.
    """

    url: str
    duration_s: float = 30.0
    concurrency: int = 8
    rate: float | None = None
    hops: Sequence[int] = (2, 3, 4)
    seed: int = 0
    api_key: str | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        try:
            scheme = httpx.URL(self.url).scheme
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.url}: not a URL ({error})") from error
        if scheme not in ("http", "https"):
            raise ConfigError(f"url must begin with http:// or https://, got {self.url}")
        if self.duration_s <= 0 or self.timeout_s <= 0:
            raise ConfigError(f"duration_s and timeout_s must be above 0, got {self.duration_s}, {self.timeout_s}")
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate must be above 0, got {self.rate}")
        if not self.hops:
            raise ConfigError("hops must name at least one difficulty")


@dataclass(frozen=True)
class RequestOutcome:
    """One request and what came of it.

    Attributes:
        hops: difficulty of its question.
        outcome: the HTTP status, or why there was none.
        latency_s: from the moment it was due to the end of its answer.
        iterations, exit_reason, correct: of its answer, where it got one.
    """

    hops: int
    outcome: str
    latency_s: float
    iterations: int | None = None
    exit_reason: str | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class LoadReport:
    """What came of all of them.

    Attributes:
        elapsed_s: from the first request to the last answer.
        asked: the requests in the order of their ends.
    """

    elapsed_s: float
    asked: Sequence[RequestOutcome] = field(repr=False)

    @property
    def answered(self) -> list[RequestOutcome]:
        """Those that got an answer."""
        return [asked for asked in self.asked if asked.outcome == OK]

    def to_json(self) -> dict[str, Any]:
        """Everything counted, as ``slr load --json`` prints it."""
        answered = self.answered
        latencies = sorted(asked.latency_s for asked in answered)
        iterations = Counter(asked.iterations for asked in answered if asked.iterations is not None)
        return {
            "elapsed_s": self.elapsed_s,
            "requests": len(self.asked),
            "outcomes": dict(sorted(Counter(asked.outcome for asked in self.asked).items())),
            "answers_per_s": len(answered) / self.elapsed_s if self.elapsed_s else 0.0,
            "latency_s": {name: quantile(latencies, q) for name, q in QUANTILES.items()},
            "iterations": {str(t): iterations[t] for t in sorted(iterations)},
            "exit_reasons": dict(sorted(Counter(str(asked.exit_reason) for asked in answered).items())),
            "by_hops": {
                str(hops): _by_hops([asked for asked in answered if asked.hops == hops])
                for hops in sorted({asked.hops for asked in answered})
            },
        }


def _by_hops(answered: list[RequestOutcome]) -> dict[str, float]:
    count = len(answered)
    return {
        "answers": count,
        "iterations": sum(asked.iterations or 0 for asked in answered) / count,
        "accuracy": sum(asked.correct or False for asked in answered) / count,
        "p50_s": quantile(sorted(asked.latency_s for asked in answered), 0.5) or 0.0,
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """The smallest of the sorted values that a share ``q`` of them does not exceed; ``None`` of none."""
    return values[max(0, ceil(q * len(values)) - 1)] if values else None


def questions(hops: Sequence[int], seed: int) -> Iterator[tuple[int, Example]]:
    """Endless balanced ProsQA questions with their hops, drawn alike from ``hops``.

    Raises:
        ConfigError: there is no question of so many hops.
    """
    streams = {h: generate(GraphSpec(max(10, 2 * h + 2), h, h, balanced=True), seed + h) for h in hops}
    rng = random.Random(seed)
    while True:
        chosen = rng.choice(hops)
        yield chosen, next(streams[chosen])


async def run_load(
    plan: LoadPlan, progress: Callable[[float, RequestOutcome], None] = lambda elapsed_s, asked: None
) -> LoadReport:
    """Send requests to a server as planned.

    Args:
        plan: what to ask.
        progress: hears of every end, with the seconds since the beginning.

    Raises:
        ConfigError: there are no such questions.
        EngineError: the server could not be reached at all.
    """
    asked: list[RequestOutcome] = []
    source = questions(plan.hops, plan.seed)
    headers = {} if plan.api_key is None else {"authorization": f"Bearer {plan.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=plan.concurrency)
    client = httpx.AsyncClient(base_url=plan.url, timeout=plan.timeout_s, limits=limits, headers=headers)
    began = time.perf_counter()

    async def ask(due: float) -> None:
        hops, example = next(source)
        asked.append(await _ask(client, hops, example, due))
        progress(time.perf_counter() - began, asked[-1])

    async with client:
        await (_closed(plan, ask, began) if plan.rate is None else _open(plan, plan.rate, ask, began))
    if asked and all(one.outcome == UNREACHABLE for one in asked):
        raise EngineError(f"{plan.url}: cannot be reached")
    return LoadReport(time.perf_counter() - began, asked)


async def _closed(plan: LoadPlan, ask: Callable[[float], Any], began: float) -> None:
    async def one_client() -> None:
        while time.perf_counter() - began < plan.duration_s:
            await ask(time.perf_counter())

    await asyncio.gather(*(one_client() for _ in range(plan.concurrency)))


async def _open(plan: LoadPlan, rate: float, ask: Callable[[float], Any], began: float) -> None:
    rng = random.Random(plan.seed)
    due = began + rng.expovariate(rate)
    async with asyncio.TaskGroup() as under_way:
        while due - began < plan.duration_s:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            under_way.create_task(ask(due))
            due += rng.expovariate(rate)


async def _ask(client: httpx.AsyncClient, hops: int, example: Example, due: float) -> RequestOutcome:
    try:
        response = await client.post("/generate", json={"prompt": example.question})
        if response.status_code != httpx.codes.OK:
            return RequestOutcome(hops, str(response.status_code), time.perf_counter() - due)
        result = response.json()["results"][0]
        return RequestOutcome(
            hops=hops,
            outcome=OK,
            latency_s=time.perf_counter() - due,
            iterations=int(result["iterations"]),
            exit_reason=str(result["exit_reason"]),
            correct=ProsQA().grade(example, result["text"]),
        )
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return RequestOutcome(hops, UNREACHABLE, time.perf_counter() - due)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError):
        return RequestOutcome(hops, NO_ANSWER, time.perf_counter() - due)
