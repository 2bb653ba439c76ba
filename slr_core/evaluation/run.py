"""Run methods on questions and store every outcome, so that an interrupted run can continue."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any, TypeVar

from slr_core._version import __version__
from slr_core.checkpoint.folder import local_path
from slr_core.checkpoint.validate import checkpoint_sha256
from slr_core.evaluation.backends import Backend
from slr_core.evaluation.methods import Batch, BatchPrompts, Method, MethodSettings
from slr_core.evaluation.outcomes import MethodAnswer, Outcome, question_key
from slr_core.evaluation.store import MethodRun, Store
from slr_core.tasks.base import Example, Task
from slr_core.tasks.sources import Questions

T = TypeVar("T")
Answered = Generator[tuple[list[MethodAnswer], float], None, None]
"""For each batch, in their order, the answers and the wall time in seconds that it took."""


class BatchRunner(ABC):
    """Answers whole batches elsewhere, in place of a :class:`~slr_core.evaluation.backends.Backend`."""

    @abstractmethod
    def run(self, method: Method, task: Task, settings: MethodSettings, batches: Sequence[BatchPrompts]) -> Answered:
        """Answer batches.

        Raises:
            RequestError: a question does not fit the model.
        """


def run_spec(
    method: Method, settings: MethodSettings, task: Task, questions: Questions, model: dict[str, Any]
) -> dict[str, Any]:
    """The settings that determine the outcomes of a run: see :class:`slr_core.evaluation.store.MethodRun`."""
    return {
        "method": method.name,
        "settings": asdict(settings),
        "model": model,
        "task": task.name,
        "source": questions.source,
        "questions": len(questions.examples),
        "questions_sha256": questions.sha256,
        "slr": __version__,
    }


def identify_model(path: str | None, dtype: str = "auto", quantization: str = "none") -> dict[str, Any]:
    """Name and hash of a checkpoint folder, and the precision if it is chosen; a hub id has no hash."""
    chosen = {"dtype": dtype} if dtype != "auto" else {}
    chosen |= {"quantization": quantization} if quantization != "none" else {}
    folder = local_path(path)
    if not folder.is_dir():
        return {"name": path, **chosen}
    return {"name": folder.resolve().name, "sha256": checkpoint_sha256(folder), **chosen}


def run_method(
    method: Method,
    backend: Backend | BatchRunner,
    task: Task,
    examples: Sequence[Example],
    settings: MethodSettings,
    *,
    store: Store | None = None,
    run: MethodRun | None = None,
    batch_size: int = 64,
    warm_up: bool = False,
    progress: Callable[[int], None] = lambda answered: None,
) -> list[Outcome]:
    """Answer the questions that ``run`` does not hold yet.

    Batches are the same in a continued run as in one without interruption. The engine mixes batches, which changes
    results by rounding only.

    Args:
        method: how to answer.
        backend: holds the weights of the method, or answers batches elsewhere.
        task: puts the questions and grades the answers.
        examples: at least one question.
        settings: settings of all methods.
        store: stores the outcomes; by default nothing is stored.
        run: a run of ``store``; by default an empty one.
        batch_size: number of questions per batch; affects speed, not answers.
        warm_up: answer one question before timing starts, in this process. The first answer also starts the engine and
            allocates memory; without a warm-up, times would depend on the order of methods.
        progress: called with the number of further questions that are done.

    Returns:
        The outcomes of all questions, in their order.

    Raises:
        RequestError: a question does not fit the model.
    """
    store, run = store or Store(), run or MethodRun({})
    keys = [question_key(index, example) for index, example in enumerate(examples)]

    chunks = []
    for chunk in _chunks(list(enumerate(examples)), batch_size):
        missing = sum(keys[index] not in run.outcomes for index, _ in chunk)
        progress(len(chunk) - missing)
        if missing:
            chunks.append((chunk, missing))
    batches = [
        BatchPrompts(
            prompts=[task.prompt(example) for _, example in chunk],
            seeds=[(settings.seed * 1_000_003 + index) * 1_009 for index, _ in chunk],
            before=task.prompt(examples[chunk[0][0] - 1]) if len(examples) > 1 else None,
        )
        for chunk, _ in chunks
    ]
    if isinstance(backend, BatchRunner):
        answered = backend.run(method, task, settings, batches)
    else:
        answered = _run_here(method, backend, task, settings, batches, warm_up)
    with closing(answered):
        for (chunk, missing), (answers, seconds) in zip(chunks, answered, strict=True):
            for (index, example), answer in zip(chunk, answers, strict=True):
                if keys[index] in run.outcomes:
                    continue
                outcome = Outcome(
                    key=keys[index],
                    difficulty=task.difficulty(example),
                    answer=task.extract(answer.text),
                    correct=task.grade(example, answer.text),
                    steps_hold=task.grade_steps(example, answer.text),
                    seconds=seconds / len(chunk),
                    **vars(answer),
                )
                store.add(run, outcome)
            progress(missing)
    return [run.outcomes[key] for key in keys]


def _run_here(
    method: Method,
    backend: Backend,
    task: Task,
    settings: MethodSettings,
    batches: Sequence[BatchPrompts],
    warm_up: bool,
) -> Answered:
    """As :meth:`BatchRunner.run`, in this process."""

    def answer(prompts: BatchPrompts) -> list[MethodAnswer]:
        return method.run(Batch.of(prompts, backend, task, settings))

    if batches and warm_up:
        answer(batches[0].first())
    ended = time.perf_counter()
    # The engine takes the next batch when one leaves rows free; other methods must not share the model.
    with ThreadPoolExecutor(backend.batches_at_once if method.remote else 1) as pool:
        try:
            for answers in pool.map(answer, batches):
                began, ended = ended, time.perf_counter()
                yield answers, ended - began
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):  # itertools.batched needs Python 3.12
        yield chunk
