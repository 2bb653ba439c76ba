"""The outcome of each question, from which all tables and plots are made; one JSON line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Self

from slr_core.tasks.base import Example
from slr_core.types import Result
from slr_core.validation import from_stored


@dataclass(frozen=True)
class Outcome:
    """One question answered by one method.

    Attributes:
        key: the question: its index in the set and a hash of its text.
        difficulty: number of reasoning steps that the question needs.
        text: the generated text.
        answer: the answer that the task reads from it; ``None`` if there is none.
        correct: whether the task accepts the answer.
        steps_hold: whether the steps written before the answer are valid and lead to the right one; ``None`` if there
            are none, or if the task cannot check them.
        iterations: loop iterations; the mean over several samples.
        exit_reason: why the loop ended; empty for a method without a loop.
        relative_change: relative change at each iteration; ``None`` if undefined.
        contraction_rate: geometric mean of the contractions; ``None`` if undefined.
        oscillating: whether the loop ended alternating between two states.
        prompt_tokens: tokens of the prompt.
        tokens: generated tokens; the sum over several samples.
        forward_passes: passes of the base model for the question alone; the sum over several samples.
        flops: estimated floating-point operations of these passes; ``None`` for a server.
        added_parameters: parameters that the loop adds to the base, 0 if no iteration ran; ``None`` for a server.
        seconds: the question's share of the wall time of its batch.
    """

    key: str
    difficulty: int
    text: str
    answer: str | None
    correct: bool
    steps_hold: bool | None
    iterations: float
    exit_reason: str
    relative_change: tuple[float | None, ...]
    contraction_rate: float | None
    oscillating: bool
    prompt_tokens: int
    tokens: int
    forward_passes: int
    flops: float | None
    added_parameters: int | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: ``data`` is something else.
        """
        return from_stored(cls, data)


def question_key(index: int, example: Example) -> str:
    """A name for the question at ``index`` of a set; it changes with the text."""
    return f"{index}:{sha256(example.question.encode('utf-8')).hexdigest()[:12]}"


@dataclass(frozen=True)
class MethodAnswer:
    """A method's answer to one question, before it is graded; the attributes are those of :class:`Outcome`."""

    text: str
    iterations: float = 0.0
    exit_reason: str = ""
    relative_change: tuple[float | None, ...] = ()
    contraction_rate: float | None = None
    oscillating: bool = False
    prompt_tokens: int = 0
    tokens: int = 0
    forward_passes: int = 0
    flops: float | None = None
    added_parameters: int | None = None

    @classmethod
    def from_result(cls, result: Result, flops: float, added_parameters: int) -> Self:
        """The answer in a result of the loop."""
        return cls(
            text=result.text,
            iterations=result.iterations,
            exit_reason=result.exit_reason,
            relative_change=tuple(record.relative_change for record in result.records),
            contraction_rate=result.stability.contraction_rate,
            oscillating=result.stability.oscillating,
            prompt_tokens=result.prompt_tokens,
            tokens=result.completion_tokens,
            forward_passes=result.forward_passes,
            flops=flops,
            added_parameters=added_parameters if result.iterations else 0,
        )

    @classmethod
    def combine(cls, text: str, samples: Sequence[MethodAnswer]) -> MethodAnswer:
        """The answer ``text``, chosen from several samples of one question: their costs add up."""
        first = samples[0]
        return cls(
            text=text,
            iterations=sum(r.iterations for r in samples) / len(samples),
            exit_reason=first.exit_reason,
            relative_change=first.relative_change,
            contraction_rate=first.contraction_rate,
            oscillating=any(r.oscillating for r in samples),
            prompt_tokens=first.prompt_tokens,
            tokens=sum(r.tokens for r in samples),
            forward_passes=sum(r.forward_passes for r in samples),
            flops=None if first.flops is None else sum(r.flops or 0.0 for r in samples),
            added_parameters=first.added_parameters,
        )
