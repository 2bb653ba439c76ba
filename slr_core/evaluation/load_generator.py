"""Load for a server: questions over HTTP, and what became of each request.

A closed load has a fixed number of clients, each of which sends its next request when it has an answer, as a batch job
does: a slow server gets fewer requests. An open load sends requests at random times at a given rate, independent of the
answers, as the public does. Latency is counted from the time at which a request was due, so that a generator that falls
behind does not make the server look faster.
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

from slr_core.client.core import to_error
from slr_core.errors import ConfigError, EngineError
from slr_core.tasks.base import Example, Task
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate_prosqa

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
OK, NO_ANSWER, UNREACHABLE = "200", "no answer", "unreachable"
POLL_S = 0.25
"""Seconds between two looks at a server that is starting."""


@dataclass(frozen=True)
class LoadPlan:
    """What to send to a server, and when.

    Attributes:
        url: the server's URL.
        duration_s: time in seconds during which requests are sent; their answers are awaited.
        concurrency: number of clients of a closed load.
        rate: requests per second of an open load; ``None``: the load is closed.
        task: puts the questions and grades the answers.
        examples: the questions, sent in random order and again from the start; empty: ``task`` generates them.
        hops: number of hops of generated ProsQA questions, drawn with equal probability.
        seed: seed of questions and arrival times.
        api_key: API key of the server.
        timeout_s: longest time in seconds to wait for an answer, and for a server that is starting.
    """

    url: str
    duration_s: float = 30.0
    concurrency: int = 8
    rate: float | None = None
    task: Task = field(default_factory=ProsQA)
    examples: Sequence[Example] = ()
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

    def questions(self) -> Iterator[Example]:
        """The questions in the order in which they are sent, without end.

        Raises:
            ConfigError: the task cannot generate questions, or not with this number of hops.
        """
        if self.examples:
            return _repeated(self.examples, self.seed)
        if isinstance(self.task, ProsQA):
            return _prosqa(self.hops, self.seed)
        return self.task.generate(self.seed)


def _repeated(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(examples, len(examples))


def _prosqa(hops: Sequence[int], seed: int) -> Iterator[Example]:
    streams = {h: generate_prosqa(GraphSpec(max(10, 2 * h + 2), h, h, balanced=True), seed + h) for h in hops}
    rng = random.Random(seed)
    while True:
        yield next(streams[rng.choice(hops)])


@dataclass(frozen=True)
class RequestOutcome:
    """One request and what became of it.

    Attributes:
        difficulty: number of reasoning steps of its question.
        outcome: the HTTP status, or why there was none.
        latency_s: time in seconds from when it was due to the end of its answer.
        iterations: number of loop iterations; ``None`` without an answer.
        exit_reason: why the loop ended; ``None`` without an answer.
        correct: whether the task accepts the answer; ``None`` without an answer.
    """

    difficulty: int
    outcome: str
    latency_s: float
    iterations: int | None = None
    exit_reason: str | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class LoadReport:
    """The outcomes of all requests.

    Attributes:
        elapsed_s: time in seconds from the first request to the last answer.
        requests: in the order in which they ended.
    """

    elapsed_s: float
    requests: Sequence[RequestOutcome] = field(repr=False)

    @property
    def answered(self) -> list[RequestOutcome]:
        """The requests that got an answer."""
        return [request for request in self.requests if request.outcome == OK]

    def to_json(self) -> dict[str, Any]:
        """All counts, as ``slr load --json`` prints them."""
        answered = self.answered
        latencies = sorted(request.latency_s for request in answered)
        iterations = Counter(request.iterations for request in answered if request.iterations is not None)
        return {
            "elapsed_s": self.elapsed_s,
            "requests": len(self.requests),
            "outcomes": dict(sorted(Counter(request.outcome for request in self.requests).items())),
            "answers_per_s": len(answered) / self.elapsed_s if self.elapsed_s else 0.0,
            "latency_s": {name: quantile(latencies, q) for name, q in QUANTILES.items()},
            "iterations": {str(t): iterations[t] for t in sorted(iterations)},
            "exit_reasons": dict(sorted(Counter(str(request.exit_reason) for request in answered).items())),
            "by_difficulty": {
                str(level): _figures([request for request in answered if request.difficulty == level])
                for level in sorted({request.difficulty for request in answered})
            },
        }


def _figures(answered: list[RequestOutcome]) -> dict[str, float]:
    count = len(answered)
    return {
        "answers": count,
        "iterations": sum(request.iterations or 0 for request in answered) / count,
        "accuracy": sum(request.correct or False for request in answered) / count,
        "p50_s": quantile(sorted(request.latency_s for request in answered), 0.5) or 0.0,
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """The smallest of the sorted ``values`` that is at least as large as a share ``q`` of them; ``None`` if empty."""
    return values[max(0, ceil(q * len(values)) - 1)] if values else None


async def run_load(
    plan: LoadPlan, progress: Callable[[float, RequestOutcome], None] = lambda elapsed_s, request: None
) -> LoadReport:
    """Wait until a server has loaded its model, then send requests to it as planned.

    Args:
        plan: what to send.
        progress: called with the seconds since the start and each request that ends.

    Raises:
        ConfigError: there are no such questions.
        EngineError: the server could not be reached at all, or does not start within ``timeout_s``.
    """
    requests: list[RequestOutcome] = []
    source = plan.questions()
    headers = {} if plan.api_key is None else {"authorization": f"Bearer {plan.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=plan.concurrency)
    client = httpx.AsyncClient(base_url=plan.url, timeout=plan.timeout_s, limits=limits, headers=headers)
    began = 0.0

    async def send(due: float) -> None:
        requests.append(await _send(client, plan.task, next(source), due))
        progress(time.perf_counter() - began, requests[-1])

    async with client:
        await _wait_until_started(client, plan)
        began = time.perf_counter()
        await (_closed(plan, send, began) if plan.rate is None else _open(plan, plan.rate, send, began))
    if requests and all(request.outcome == UNREACHABLE for request in requests):
        raise EngineError(f"{plan.url}: cannot be reached")
    return LoadReport(time.perf_counter() - began, requests)


async def _wait_until_started(client: httpx.AsyncClient, plan: LoadPlan) -> None:
    """Return when the server is no longer starting; what else it may have is left to the requests."""
    end = time.perf_counter() + plan.timeout_s
    while True:
        try:
            response = await client.get("/startupz")
        except httpx.HTTPError:
            return
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            return
        if time.perf_counter() > end:
            raise EngineError(f"{plan.url}: not started after {plan.timeout_s:g} s ({to_error(response)})")
        await asyncio.sleep(POLL_S)


async def _closed(plan: LoadPlan, send: Callable[[float], Any], began: float) -> None:
    async def one_client() -> None:
        while time.perf_counter() - began < plan.duration_s:
            await send(time.perf_counter())

    await asyncio.gather(*(one_client() for _ in range(plan.concurrency)))


async def _open(plan: LoadPlan, rate: float, send: Callable[[float], Any], began: float) -> None:
    rng = random.Random(plan.seed)
    due = began + rng.expovariate(rate)
    async with asyncio.TaskGroup() as running:
        while due - began < plan.duration_s:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            running.create_task(send(due))
            due += rng.expovariate(rate)


async def _send(client: httpx.AsyncClient, task: Task, example: Example, due: float) -> RequestOutcome:
    difficulty = task.difficulty(example)
    try:
        response = await client.post("/generate", json={"prompt": task.prompt(example)})
        if response.status_code != httpx.codes.OK:
            return RequestOutcome(difficulty, str(response.status_code), time.perf_counter() - due)
        latency_s = time.perf_counter() - due
        result = response.json()["results"][0]
        return RequestOutcome(
            difficulty=difficulty,
            outcome=OK,
            latency_s=latency_s,
            iterations=int(result["iterations"]),
            exit_reason=str(result["exit_reason"]),
            # In a thread: a grader may take long, and must not delay other requests.
            correct=await asyncio.to_thread(task.grade, example, result["text"]),
        )
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return RequestOutcome(difficulty, UNREACHABLE, time.perf_counter() - due)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError):
        return RequestOutcome(difficulty, NO_ANSWER, time.perf_counter() - due)
