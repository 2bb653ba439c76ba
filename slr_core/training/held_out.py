"""The questions that a training keeps out, and what the trained model makes of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from slr_core import tasks
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from slr_core.training.config import TrainConfig
from slr_core.training.sources import load_source_questions, split_held_out
from slr_core.training.stages import DataConfig
from slr_core.types import Result

GENERATED = 100
"""Number of fresh questions that stand for held-out ones where questions are generated."""
_BATCH = 32


@dataclass(frozen=True)
class HeldOutSet:
    """Questions of one task that no training step sees.

    Attributes:
        task: name of the task.
        examples: the questions.
        generated: whether they are fresh questions of the task's generator, and not from a file or split.
    """

    task: str
    examples: tuple[Example, ...]
    generated: bool

    @property
    def file_name(self) -> str:
        """Name of the file in the checkpoint folder that :func:`write_held_out` writes."""
        return f"held_out_{re.sub(r'[^A-Za-z0-9]+', '_', self.task).strip('_')}.jsonl"


@dataclass(frozen=True)
class HeldOutResult:
    """How the trained model answers the questions of a :class:`HeldOutSet`.

    Attributes:
        task: name of the task.
        file: their file in the checkpoint folder; ``None`` if they were generated.
        questions: number of questions.
        right: number of right answers.
        converged: share of the loops that the criterion ended; ``None`` without a loop.
        iterations: mean number of iterations.
    """

    task: str
    file: str | None
    questions: int
    right: int
    converged: float | None
    iterations: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        score = f"{self.right} of {self.questions} right ({self.right / self.questions:.3f})"
        if self.converged is None:
            return score
        return f"{score}, {self.converged:.1%} of the loops converged, {self.iterations:.2f} iterations on average"


def held_out_sets(config: TrainConfig) -> list[HeldOutSet]:
    """The held-out questions of the last stage's data, by task; of generated data, fresh questions."""
    sources = list({data.model_dump_json(): data for data in config.schedule[-1].data if data.text is None}.values())
    generators = sum(data.generated for data in sources)
    share = -(-max(GENERATED, config.held_out) // generators) if generators else 0
    found: dict[tuple[str, bool], list[Example]] = {}
    for number, data in enumerate(sources):
        examples = (
            _fresh(data, f"{config.seed}/held out/{number}", share) if data.generated else _kept_out(data, config)
        )
        found.setdefault((str(data.task), data.generated), []).extend(examples)
    return [HeldOutSet(task, tuple(examples), generated) for (task, generated), examples in found.items() if examples]


def _fresh(data: DataConfig, seed: str, count: int) -> Iterator[Example]:
    task = tasks.get_task(str(data.task))
    return islice(task.generate(random.Random(seed).getrandbits(63), **data.generator_options), count)


def _kept_out(data: DataConfig, config: TrainConfig) -> list[Example]:
    questions = load_source_questions(data)
    return split_held_out(questions.examples, config.held_out, questions.source)[1]


def write_held_out(found: HeldOutSet, folder: Path) -> None:
    """Write the questions to their file in a checkpoint folder, as JSON lines."""
    lines = (json.dumps(example.to_json()) + "\n" for example in found.examples)
    (folder / found.file_name).write_text("".join(lines), encoding="utf-8")


def answer_held_out(reasoner: LatentReasoner, found: HeldOutSet, config: TrainConfig) -> HeldOutResult:
    """Answer held-out questions greedily, with the loop of the checkpoint, or without one if none was trained.

    Raises:
        RequestError: a question does not fit the model.
    """
    task = tasks.get_task(found.task)
    loops = config.max_iterations != 0
    loop = LoopParams() if loops else LoopParams(max_iterations=0)
    # Of like length together: little of a batch is padding.
    examples = sorted(found.examples, key=lambda example: len(example.question))
    results: list[Result] = []
    for start in range(0, len(examples), _BATCH):
        prompts = [task.prompt(example) for example in examples[start : start + _BATCH]]
        results += generate(reasoner, [prepare(reasoner, prompt, loop) for prompt in prompts])
    return HeldOutResult(
        found.task,
        None if found.generated else found.file_name,
        len(examples),
        sum(task.grade(example, result.text) for example, result in zip(examples, results, strict=True)),
        fmean(result.exit_reason == "converged" for result in results) if loops else None,
        fmean(result.iterations for result in results),
    )
