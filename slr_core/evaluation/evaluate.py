"""Score a latent reasoner on a task, with the code that serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import sqrt
from statistics import fmean
from typing import Any

from slr_core.generation import Result, generate, prepare
from slr_core.loop.convergence import LoopSettings
from slr_core.model import LatentReasoner
from slr_core.tasks.base import Example, Task


@dataclass(frozen=True)
class Summary:
    """Figures over a set of questions.

    Attributes:
        questions: how many.
        accuracy: share answered right.
        interval: 95 % Wilson score interval of the accuracy.
        iterations: mean loop iterations.
        converged: share that ended by the criterion.
        diverged: share that ended by the guard.
        forward_passes: mean passes per question, as if each had been alone.
        relative_change: mean relative change at iteration 1, 2, ... over the questions that got there.
    """

    questions: int
    accuracy: float
    interval: tuple[float, float]
    iterations: float
    converged: float
    diverged: float
    forward_passes: float
    relative_change: tuple[float | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of :func:`evaluate`.

    Attributes:
        overall: all questions.
        by_difficulty: per number of reasoning steps, ascending.
        baselines: mean score of each shortcut rule that the task knows, on the same questions.
        seconds: wall time of the model's work.
    """

    overall: Summary
    by_difficulty: dict[int, Summary]
    baselines: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate(
    reasoner: LatentReasoner,
    task: Task,
    examples: Sequence[Example],
    *,
    settings: LoopSettings,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda answered: None,
) -> Evaluation:
    """Answer every example greedily and grade it.

    Args:
        reasoner: in eval mode.
        task: grades and knows the shortcuts.
        examples: at least one.
        settings: the loop's; ``max_iterations`` 0 is the model without its loop.
        batch_size: rows per batch; it changes the speed, not the answers.
        progress: told how many more questions were answered, after each batch.

    Raises:
        RequestError: a question does not fit the model.
    """
    began = time.perf_counter()
    graded: list[tuple[Example, Result, bool]] = []
    for batch in _batches(examples, batch_size):
        requests = [prepare(reasoner, example.question, settings) for example in batch]
        for example, result in zip(batch, generate(reasoner, requests), strict=True):
            graded.append((example, result, task.grade(example, result.text)))
        progress(len(batch))
    seconds = time.perf_counter() - began

    levels = sorted({task.difficulty(example) for example in examples})
    rules = [task.baselines(example) for example in examples]
    return Evaluation(
        overall=summarize([(result, right) for _, result, right in graded]),
        by_difficulty={
            level: summarize([(result, right) for e, result, right in graded if task.difficulty(e) == level])
            for level in levels
        },
        baselines={name: fmean(scores[name] for scores in rules) for name in rules[0]},
        seconds=seconds,
    )


def summarize(graded: Sequence[tuple[Result, bool]]) -> Summary:
    """Figures of graded results; at least one."""
    results = [result for result, _ in graded]
    deepest = max(result.iterations for result in results)
    changes = [
        [c for r in results if len(r.records) > t and (c := r.records[t].relative_change) is not None]
        for t in range(deepest)
    ]
    right = sum(correct for _, correct in graded)
    return Summary(
        questions=len(graded),
        accuracy=right / len(graded),
        interval=wilson(right, len(graded)),
        iterations=fmean(result.iterations for result in results),
        converged=fmean(result.exit_reason == "converged" for result in results),
        diverged=fmean(result.exit_reason == "diverged" for result in results),
        forward_passes=fmean(result.forward_passes for result in results),
        relative_change=tuple(fmean(x) if x else None for x in changes),
    )


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927); unlike the normal one it behaves near 0 and 1."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    rest = iter(examples)
    while batch := list(islice(rest, size)):  # itertools.batched wants Python 3.12
        yield batch
