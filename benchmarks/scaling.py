"""The simulator against a server, and what it predicts for many machines.

    python -m benchmarks.scaling [--seconds 40] [--out benchmarks/results/scaling]

Closed loads of one server measure what a step costs by rows and prompts, before and after each open load: requests that
arrive at random, at three rates. The simulator gets the same arrivals. The model is that of `benchmarks.overload`, one
engine thread; loops run as many iterations as `EXITS` draws. A second part needs no server: it predicts the replicas
for up to a million questions a minute, from the measured cost of a CPU and from assumed GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.overload import build, exchange
from benchmarks.server_process import start_server
from benchmarks.simulator import Arrival, Fleet, StepCost, poisson, replicas_for, simulate

SLOTS, TOKENS = 16, 4
EXITS = {3: 0.10, 4: 0.30, 5: 0.25, 6: 0.15, 8: 0.10, 12: 0.06, 16: 0.04}
"""Share of loops that end at each iteration: most settle early, few need the whole budget."""
BUDGET = max(EXITS)
LOADS = (0.3, 0.6, 0.85)
"""Open loads, as shares of the saturating rate."""
CALIBRATION = tuple(product((1, 2, 4, 8, 16, 24), ((1, 6), (8, 24))))
"""Closed loads: clients, and the fewest and most iterations, between which each request draws: its answers then begin
and end at any time, as in open loads."""
RAMP_S, CALIBRATION_S = 0.5, 1.5
"""Seconds of a closed load before it counts, and in which it counts."""
TOLERANCE = 0.2
PROMPT = (
    "Every rorpus is a lempus. Tom is a rorpus. Every wumpus is a impus. Fae is a wumpus. Is Fae a impus or yumpus?"
)
PER_MINUTE = (1_000, 10_000, 100_000, 1_000_000)
P99_S = 1.0


@dataclass(frozen=True)
class Machine:
    """An instance type. Prices are list prices on demand, rounded, of late 2026 or assumed; replace them by yours.

    Attributes:
        name: what it is.
        dollars_per_hour: price.
        replicas: servers that run on it.
        cost: of a step; ``None``: the measured one.
        slots: of each server.
    """

    name: str
    dollars_per_hour: float
    replicas: int
    cost: StepCost | None = None
    slots: int = SLOTS


# A GPU's step is assumed: 2.5 or 1.8 ms of launches, and per answer what the memory bandwidth gives. 2 ms an answer go
# to HTTP and tokenization, which share Python's lock with the engine: a process answers at most 500 requests a second.
MACHINES = (
    Machine("CPU, 16 vCPU (8 cores, one server each)", 0.71, 8),
    Machine("GPU of 24 GB (assumed step)", 0.80, 1, StepCost(0.0025, 0.000015, 0.0, 0.002, 0.001), 128),
    Machine("GPU of 80 GB (assumed step)", 3.50, 1, StepCost(0.0018, 0.000004, 0.0, 0.002, 0.001), 512),
)


@dataclass(frozen=True)
class Answer:
    """A measured answer: when it was due, its latency, and its seconds in the engine."""

    at: float
    latency_s: float
    engine_s: float
    iterations: int
    tokens: int


async def ask(url: str, iterations: int, at: float, due: float, answers: list[Answer]) -> None:
    """Send a request; ``due`` is its ``time.perf_counter``. Only answers are recorded."""
    body = json.dumps(
        {
            "prompt": PROMPT,
            "max_iterations": iterations,
            "convergence": {"criterion": "fixed"},
            "max_new_tokens": TOKENS,
        }
    ).encode()
    head = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    status, text = await exchange(url, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    took = time.perf_counter() - due
    if int(status.split()[1]) == 200:
        (result,) = json.loads(text)["results"]
        tokens = result["usage"]["completion_tokens"]
        answers.append(Answer(at, took, result["timings"]["total_s"], iterations, tokens))


@dataclass(frozen=True)
class Work:
    """What a server did in a time, by its own metrics.

    Attributes:
        seconds: the time.
        steps: its steps.
        rows: answers in them, summed.
        busy_s: seconds of the steps, summed.
        answers: requests answered.
    """

    seconds: float
    steps: float
    rows: float
    busy_s: float
    answers: float

    def since(self, earlier: Work) -> Work:
        """The difference."""
        return Work(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


async def read_work(url: str) -> Work:
    """The server's metrics so far."""
    request = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    _, text = await exchange(url, request)
    names = ("step_duration_seconds_count", "step_rows_sum", "step_duration_seconds_sum")
    found = [float(re.search(rf"^slr_{name} (\S+)$", text.decode(), re.MULTILINE)[1]) for name in names]  # type: ignore[index]
    answers = re.search(r'^slr_requests_total{endpoint="/generate",status="ok"} (\S+)$', text.decode(), re.MULTILINE)
    return Work(time.perf_counter(), found[0], found[1], found[2], float(answers[1]) if answers else 0.0)


async def closed_load(
    url: str, clients: int, iterations: tuple[int, int], seconds: float, seed: int
) -> tuple[list[Answer], Work]:
    """Clients that send their next request, with a random number of iterations, after the last answer.

    Returns:
        All answers, and the server's work in the given seconds, which begin after :data:`RAMP_S`.
    """
    answers: list[Answer] = []
    over = asyncio.Event()

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while not over.is_set():
            now = time.perf_counter()
            await ask(url, rng.randint(*iterations), now, now, answers)

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
        await asyncio.sleep(RAMP_S)
        before = await read_work(url)
        await asyncio.sleep(seconds)
        work = (await read_work(url)).since(before)
        over.set()
    return answers, work


async def open_load(url: str, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Send each request at its time."""
    answers: list[Answer] = []
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            due = began + arrival.at
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(ask(url, arrival.iterations, arrival.at, due, answers))
    return answers


@dataclass(frozen=True)
class ClosedLoad:
    """What a closed load measured.

    Attributes:
        clients: how many.
        work: of the server.
        outside_s: median seconds of an answer outside the engine.
    """

    clients: int
    work: Work
    outside_s: float


def calibrate(url: str, seconds: float, seed: int) -> list[ClosedLoad]:
    """Run all closed loads."""
    loads = []
    for clients, iterations in CALIBRATION:
        answers, work = asyncio.run(closed_load(url, clients, iterations, seconds, seed))
        loads.append(ClosedLoad(clients, work, median(a.latency_s - a.engine_s for a in answers)))
    return loads


def fit(loads: Sequence[ClosedLoad]) -> StepCost:
    """The cost of a step by least squares, where errors count relatively, and what answers cost beside it.

    With as many clients as slots, or more, the engine always has work: its time outside steps is that of requests. An
    answer's time outside the engine is the mean of all loads with several clients, whose answers wait for the engine.
    """
    works = [load.work for load in loads]
    table = np.array([(work.steps, work.rows, work.answers, work.busy_s) for work in works])
    shares = table[:, :3] / table[:, 3:]
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(shares[:, kept], np.ones(len(table)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(np.argmin(found)))  # a part that costs nothing
    parts = dict(zip(kept, found.tolist(), strict=True))
    full = [load.work for load in loads if load.clients >= SLOTS]
    request_s = sum(work.seconds - work.busy_s for work in full) / sum(work.answers for work in full)
    outside_s = fmean(load.outside_s for load in loads if load.clients > 1)
    return StepCost(parts.get(0, 0.0), parts.get(1, 0.0), parts.get(2, 0.0), request_s, max(0.0, outside_s - request_s))


def figures(latencies: Sequence[float], seconds: float) -> dict[str, float]:
    """Throughput and latencies."""
    ordered = sorted(latencies)
    at = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in (("p50", 0.5), ("p99", 0.99))}
    return {"answers_per_s": len(ordered) / seconds, "p50_ms": 1000 * at["p50"], "p99_ms": 1000 * at["p99"]}


def validate(seconds: float) -> dict[str, Any]:
    """Measure a server, and predict the same loads.

    The cost of a step is measured before and after each load, because the speed of a machine changes within minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        process, url = start_server(model=folder, slots=SLOTS, elastic_floor=1, prefix_gib=0)
        try:
            asyncio.run(closed_load(url, SLOTS, (1, BUDGET), min(5.0, seconds), seed=2))
            calibrations = [calibrate(url, CALIBRATION_S, seed=0)]
            rate = saturating_rate(fit(calibrations[0]))
            sent = {}
            for seed, load in enumerate(LOADS, start=1):
                arrivals = list(poisson(load * rate, seconds, EXITS, TOKENS, seed=round(100 * load)))
                sent[load] = arrivals, asyncio.run(open_load(url, arrivals))
                calibrations.append(calibrate(url, CALIBRATION_S, seed))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            if process.stdout is not None:
                process.stdout.close()
    loads = {}
    for (load, (arrivals, answers)), (before, after) in zip(sent.items(), pairwise(calibrations), strict=True):
        # As many tokens as the model wrote.
        tokens = round(fmean(a.tokens for a in answers))
        same = [Arrival(a.at, a.iterations, tokens) for a in arrivals]
        predicted = simulate(same, Fleet(1, SLOTS), fit(before + after))
        loads[f"{load:g}"] = {
            "requests": len(arrivals),
            "measured": figures([a.latency_s for a in answers], seconds),
            "predicted": figures(predicted.latencies, seconds),
        }
    measured = [load for calibration in calibrations for load in calibration]
    return {
        "cost": asdict(fit(measured)),
        "rate": rate,
        "calibration": [asdict(load) for load in measured],
        "loads": loads,
    }


def saturating_rate(cost: StepCost, slots: int = SLOTS) -> float:
    """Answers per second of a server whose slots are all in use."""
    passes = sum(n * share for n, share in EXITS.items()) / sum(EXITS.values()) + TOKENS
    return 1 / (passes * (cost.fixed_s / slots + cost.row_s) + cost.prompt_s + cost.request_s)


def predict(cost: StepCost, rates: Sequence[int]) -> list[dict[str, Any]]:
    """The replicas for each rate, and what they cost."""
    found = []
    for machine in MACHINES:
        step = machine.cost or cost
        fleet = partial(Fleet, slots=machine.slots)
        # Without early exit, every loop runs its whole budget.
        for name, exits in (("on", EXITS), ("off", {BUDGET: 1.0})):
            for per_minute in rates:
                chosen, prediction = replicas_for(per_minute / 60, fleet, step, exits, TOKENS, P99_S)
                machines = -(-chosen.replicas // machine.replicas)
                found.append(
                    {
                        "machine": machine.name,
                        "early_exit": name,
                        "per_minute": per_minute,
                        "replicas": chosen.replicas,
                        "machines": machines,
                        "p50_ms": 1000 * prediction.quantile(0.5),
                        "p99_ms": 1000 * prediction.quantile(0.99),
                        "busy": prediction.busy_share,
                        "dollars_per_million": machines * machine.dollars_per_hour / (60 * per_minute) * 1e6,
                    }
                )
    return found


def elastic(cost: StepCost) -> list[dict[str, float]]:
    """One server at 1.2 times its saturating rate, with and without elastic depth."""
    arrivals = list(poisson(1.2 * saturating_rate(cost), 120, EXITS, TOKENS))
    rows = []
    for floor in (1.0, 0.5):
        found = simulate(arrivals, Fleet(1, SLOTS, max_iterations=BUDGET, elastic_floor=floor), cost, warm_up_s=30)
        rows.append({"floor": floor, **figures(found.latencies, found.seconds), "refused": found.refused})
    return rows


def report(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    cost, loads = record["cost"], record["loads"]
    parts = ", ".join(
        f"{1000 * cost[f'{name}_s']:.2f} ms {where}"
        for name, where in (
            ("fixed", "each"),
            ("row", "an answer in it"),
            ("prompt", "a prompt"),
            ("request", "a request, in which the engine waits"),
            ("outside", "an answer outside the engine"),
        )
    )
    lines = [
        f"`python -m benchmarks.scaling --seconds {record['seconds']:g}`. Cost of a step by closed loads: {parts}.",
        f"Saturating rate: {record['rate']:.1f} answers/s. Open loads, each in that many seconds:",
        "",
        "| load | figure | measured | predicted | error |",
        "|---|---|---|---|---|",
    ]
    worst = 0.0
    for load, row in loads.items():
        for name, measured in row["measured"].items():
            error = row["predicted"][name] / measured - 1
            worst = max(worst, abs(error))
            lines.append(f"| {load} | {name} | {measured:.1f} | {row['predicted'][name]:.1f} | {100 * error:+.0f} % |")
    verdict = "met" if worst <= TOLERANCE else "**missed**"
    lines += ["", f"Largest error {100 * worst:.0f} %; target {100 * TOLERANCE:.0f} %: {verdict}.", ""]
    lines += [
        f"Fleets that keep p99 within {P99_S:g} s:",
        "",
        "| machine | early exit | questions/min | servers | machines | p50 ms | p99 ms | busy | $ per million |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["predictions"]:
        lines.append(
            f"| {row['machine']} | {row['early_exit']} | {row['per_minute']:,} | {row['replicas']} "
            f"| {row['machines']} | "
            f"{row['p50_ms']:.0f} | {row['p99_ms']:.0f} | {row['busy']:.2f} | {row['dollars_per_million']:.2f} |"
        )
    lines += [
        "",
        "One server at 1.2 times its saturating rate, for 90 s:",
        "",
        "| elastic floor | answers/s | p50 ms | p99 ms | refused |",
        "|---|---|---|---|---|",
    ]
    for row in record["elastic"]:
        cells = [f"{row[name]:.1f}" for name in ("answers_per_s", "p50_ms", "p99_ms")]
        lines.append(f"| {row['floor']:g} | {' | '.join(cells)} | {row['refused']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of each open load")
    parser.add_argument("--per-minute", type=int, nargs="*", default=PER_MINUTE, help="rates to predict")
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    record = validate(options.seconds) | {"seconds": options.seconds}
    cost = StepCost(**record["cost"])
    record |= {"predictions": predict(cost, options.per_minute), "elastic": elastic(cost)}
    text = report(record)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
