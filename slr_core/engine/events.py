"""Events of a request while it runs. Every event is immutable and can be passed between threads."""

from __future__ import annotations

from dataclasses import dataclass

from slr_core.types import IterationRecord, Result, TokenScore


@dataclass(frozen=True)
class IterationEvent:
    """An iteration has ended. ``record.thought`` is not set: thoughts are decoded after the loop."""

    record: IterationRecord


@dataclass(frozen=True)
class TokenEvent:
    """A token was chosen.

    Attributes:
        token_id: the token.
        text: the text that no earlier event had and that no later token can change. It is empty while the answer
            ends with an incomplete character or with the start of a stop string.
        score: its log-probability, if the request asks for log-probabilities.
        iterations: in the workspace ``token``, the iteration at whose state it was read; ``None`` in the others.
    """

    token_id: int
    text: str
    score: TokenScore | None = None
    iterations: int | None = None


@dataclass(frozen=True)
class FinishedEvent:
    """The request has finished: its last event."""

    result: Result


Event = IterationEvent | TokenEvent | FinishedEvent
