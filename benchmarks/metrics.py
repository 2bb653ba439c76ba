"""Cost of recording metrics, as a share of an engine step.

    python -m benchmarks.metrics

On the bundled checkpoint, whose steps are very short: with one answer at a time, and with 32. Steps are timed without
metrics, and recording their metrics is timed afterwards. Both are in CPU time of one thread, repeated, and the best of
each counts, so that other load on the machine does not matter.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from itertools import islice

import torch
from transformers.utils import logging

from slr_core.engine import Engine, StepStats
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.prosqa import GraphSpec, generate_prosqa
from slr_core.types import Request, Result
from slr_server.observability.metrics import Metrics

MAX_SHARE = 0.02
"""Maximum share of a step that recording may take."""
ANSWERS, TURNS = 64, 10


def main() -> None:
    """Run the benchmark."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    reasoner = LatentReasoner.from_pretrained()
    print("| answers at once | step | recording | share |", "|---|---|---|---|", sep="\n")
    for at_once in (1, 32):
        step_s, recording_s = measure(reasoner, at_once)
        share = recording_s / step_s
        mark = "" if share <= MAX_SHARE else f" (over {MAX_SHARE:.0%})"
        print(f"| {at_once} | {1e6 * step_s:.0f} µs | {1e6 * recording_s:.1f} µs | {share:.2%}{mark} |")


def measure(reasoner: LatentReasoner, at_once: int) -> tuple[float, float]:
    """Seconds of a step without metrics, and of recording the metrics of a step."""
    steps: list[StepStats] = []
    ends: list[float] = []

    def record(step: StepStats) -> None:
        steps.append(step)
        ends.append(time.thread_time())

    turns: list[tuple[float, float]] = []
    questions = [example.question for example in islice(generate_prosqa(GraphSpec(10, 2, 4, True), 0), ANSWERS)]
    with Engine(reasoner, slots=at_once, prefix_gib=0, threads=1, on_step=record) as engine:
        requests = [engine.prepare(question) for question in questions]
        _run(engine, requests[:at_once], at_once)  # warm-up
        for _ in range(TURNS):
            steps.clear()
            ends.clear()
            results = _run(engine, requests, at_once)
            metrics = Metrics("benchmark")
            began = time.thread_time()
            _record(metrics, steps, requests, results)
            recording_s = time.thread_time() - began
            turns.append(((ends[-1] - ends[0]) / (len(ends) - 1), recording_s / len(steps)))
    step_s, recording_s = map(min, zip(*turns, strict=True))
    return step_s, recording_s


def _run(engine: Engine, requests: list[Request], at_once: int) -> list[Result]:
    results: list[Result] = []
    for start in range(0, len(requests), at_once):
        futures = [engine.submit(request) for request in requests[start : start + at_once]]
        results += [future.result() for future in futures]
    return results


def _record(metrics: Metrics, steps: list[StepStats], requests: list[Request], results: list[Result]) -> None:
    for step in steps:
        metrics.record_step(step)
    for request, result in zip(requests, results, strict=True):
        future: Future[Result] = Future()
        future.set_result(result)
        metrics.record(request, future)


if __name__ == "__main__":
    main()
