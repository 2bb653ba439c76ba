"""What becomes known of a request while it is handled: for its log line, its metrics and its span."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from slr_core.types import Result, Timings


@dataclass
class RequestStats:
    """Of one HTTP request; the handlers write, the middleware reads.

    Attributes:
        status: the status that counts, where it is not the one that was sent: a stream that fails has sent 200.
        error: code of the error, where there was one.
        answers: how many it asks for.
        stream: whether they are streamed.
        results: those that are done.
        reduced: how many of the answers got a smaller iteration budget than they asked for.
    """

    status: int | None = None
    error: str | None = None
    answers: int = 0
    stream: bool = False
    loop_set: str | None = None
    results: list[Result] = field(default_factory=list)
    reduced: int = 0

    @property
    def timings(self) -> Timings | None:
        """Of the answer that took longest."""
        return max((result.timings for result in self.results), key=lambda timings: timings.total_s, default=None)


_current: ContextVar[RequestStats] = ContextVar("facts")


def begin() -> RequestStats:
    """Start those of a request; they hold for its task and for the tasks that it starts."""
    stats = RequestStats()
    _current.set(stats)
    return stats


def current() -> RequestStats:
    """Those of the request that is being handled; outside of one, some that nobody reads."""
    return _current.get(RequestStats())
