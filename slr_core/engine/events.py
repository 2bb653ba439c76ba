"""What the engine tells of a request while it runs; every event is immutable and safe to pass between threads."""

from __future__ import annotations

from dataclasses import dataclass

from slr_core.types import IterationRecord, Result, TokenScore


@dataclass(frozen=True)
class IterationEvent:
    """An iteration is done. ``record`` has no thought: the whole loop is put into words at its end."""

    record: IterationRecord


@dataclass(frozen=True)
class TokenEvent:
    """A token is written. ``text`` is what may be shown of the answer beyond the last event: it never takes
    anything back, so it is empty while a character or a stop string may still be under way."""

    token_id: int
    text: str
    score: TokenScore | None = None
    """Where the request asks for log-probabilities."""


@dataclass(frozen=True)
class FinishedEvent:
    """The last event of a request that came to its end."""

    result: Result


Event = IterationEvent | TokenEvent | FinishedEvent
