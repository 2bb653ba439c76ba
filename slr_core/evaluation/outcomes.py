"""What became of each question, one JSON line each: whatever a table or a plot shows is made of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any, Self

from slr_core.tasks.base import Example
from slr_core.types import Result


@dataclass(frozen=True)
class Outcome:
    """One question answered by one method.

    Attributes:
        key: which question: its place in the set and a hash of its text.
        difficulty: reasoning steps that the question needs.
        text: what was written.
        answer: what counts of it; ``None`` where nothing could be found.
        correct: whether the task says so.
        steps_hold: whether the steps written before the answer hold and lead to the right one; ``None`` where there
            are none, or the task has no rule for them.
        iterations: loop iterations; of several rollouts, their mean.
        exit_reason: why the loop ended; empty for a method without one.
        relative_change: of each iteration, ``None`` where undefined.
        contraction_rate: geometric mean of the contractions, ``None`` where undefined.
        oscillating: whether the loop ended moving between two states.
        prompt_tokens: tokens of the prompt.
        tokens: tokens written, all rollouts together.
        forward_passes: passes of the base model, all rollouts together, as if the question had been alone.
        flops: floating-point operations of those passes, estimated; ``None`` where the model is out of sight.
        added_parameters: what the loop adds to the base, 0 where no iteration ran; ``None`` as for ``flops``.
        seconds: the question's share of its batch's wall time.
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
        """The inverse; ``TypeError`` or ``KeyError`` where ``data`` is something else."""
        known = {field.name: data[field.name] for field in fields(cls)}
        return cls(**{**known, "relative_change": tuple(known["relative_change"])})


def question_key(index: int, example: Example) -> str:
    """Names the question at ``index`` of a set; another text at the same place has another name."""
    return f"{index}:{sha256(example.question.encode('utf-8')).hexdigest()[:12]}"


@dataclass(frozen=True)
class MethodAnswer:
    """What a method gives back for one question, before it is graded."""

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
        """One result of the loop."""
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
    def combine(cls, text: str, rollouts: Sequence[MethodAnswer]) -> MethodAnswer:
        """Several rollouts of one question that ``text`` was made of: their costs add up."""
        first = rollouts[0]
        return cls(
            text=text,
            iterations=sum(r.iterations for r in rollouts) / len(rollouts),
            exit_reason=first.exit_reason,
            relative_change=first.relative_change,
            contraction_rate=first.contraction_rate,
            oscillating=any(r.oscillating for r in rollouts),
            prompt_tokens=first.prompt_tokens,
            tokens=sum(r.tokens for r in rollouts),
            forward_passes=sum(r.forward_passes for r in rollouts),
            flops=None if first.flops is None else sum(r.flops or 0.0 for r in rollouts),
            added_parameters=first.added_parameters,
        )
