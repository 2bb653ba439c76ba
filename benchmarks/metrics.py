"""What recording metrics costs a step of the engine, as a share of the step.

    python -m benchmarks.metrics

One answer after another, and a full house, on the bundled checkpoint, whose steps are as short as steps get. A step is
measured without metrics; what was to be recorded is kept, and then recorded on its own. Both take turns, in processor
time of one thread, and the best turn of each counts: how busy the machine is else makes no difference.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from itertools import islice

import torch
from transformers.utils import logging

from slr_core.engine import Engine
from slr_core.engine.core import Step
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import LoopParams
from slr_core.tasks.prosqa import GraphSpec, generate
from slr_core.types import Request, Result
from slr_server.observability.metrics import Metrics

MOST = 0.02
"""The share of a step that recording may take."""
ANSWERS, TURNS = 64, 10


def main() -> None:
    """Measure, and print a line per load."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    reasoner = LatentReasoner.from_pretrained()
    print("| answers at once | a step | recorded in a step | share |", "|---|---|---|---|", sep="\n")
    for at_once in (1, 32):
        step_s, recording_s = measure(reasoner, at_once)
        share = recording_s / step_s
        mark = "" if share <= MOST else f" (over {MOST:.0%})"
        print(f"| {at_once} | {1e6 * step_s:.0f} µs | {1e6 * recording_s:.1f} µs | {share:.2%}{mark} |")


def measure(reasoner: LatentReasoner, at_once: int) -> tuple[float, float]:
    """Seconds of a step without metrics, and seconds that recording adds to it."""
    steps: list[Step] = []
    ends: list[float] = []

    def hear(step: Step) -> None:
        steps.append(step)
        ends.append(time.thread_time())

    turns: list[tuple[float, float]] = []
    questions = [example.question for example in islice(generate(GraphSpec(10, 2, 4, True), 0), ANSWERS)]
    with Engine(reasoner, slots=at_once, prefix_gib=0, threads=1, on_step=hear) as engine:
        loop = LoopParams().resolve(reasoner.config.loop)
        requests = [engine.prepare(question, loop) for question in questions]
        _run(engine, requests[:at_once], at_once)  # warm
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


def _record(metrics: Metrics, steps: list[Step], requests: list[Request], results: list[Result]) -> None:
    for step in steps:
        metrics.record_step(step)
    for request, result in zip(requests, results, strict=True):
        future: Future[Result] = Future()
        future.set_result(result)
        metrics.record(request, future)


if __name__ == "__main__":
    main()
