"""Statistics of one HTTP request: written by the code that handles it, read for its log line, metrics and span."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from slr_core.types import Result, Timings

_KEY = "slr_request_stats"


@dataclass
class RequestStats:
    """Statistics of one HTTP request. They travel in its ASGI scope: see :func:`request_stats`.

    Attributes:
        arrived_at: ``time.monotonic`` when its headers were complete. Its time limit starts here.
        probes_only: whether its connection is one beyond the limit, on which only health checks are answered.
        request_id: the id in the response header and in the log.
        status: the status that counts, where it is not the one that was sent: a stream that fails has sent 200.
        error: code of the error response, if there was one.
        answers: number of answers requested.
        stream: whether the answers are streamed.
        loop_set: name of the loop adapter set that runs the request.
        results: the finished answers.
        reduced: number of answers whose iteration budget was reduced under load.
    """

    arrived_at: float = field(default_factory=time.monotonic)
    probes_only: bool = False
    request_id: str = ""
    status: int | None = None
    error: str | None = None
    answers: int = 0
    stream: bool = False
    loop_set: str | None = None
    results: list[Result] = field(default_factory=list)
    reduced: int = 0

    @property
    def timings(self) -> Timings | None:
        """Timings of the answer that took longest."""
        return max((result.timings for result in self.results), key=lambda timings: timings.total_s, default=None)


def request_stats(scope: Scope) -> RequestStats:
    """The statistics in an ASGI scope; the first call adds them."""
    stats: RequestStats = scope.setdefault("state", {}).setdefault(_KEY, RequestStats())
    return stats
