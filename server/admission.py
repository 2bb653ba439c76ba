"""Backpressure: how much work may wait, how deep it may go meanwhile, and when a client that found no room should
come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from slr_core.types import Request

from .errors import QueueFull

_LONGEST_WAIT_S = 60
_RECENT_S = 60  # an idle hour says nothing about the rate under load
_REMEMBERED = 256
_FULL_PRESSURE = 0.5
"""Share of the queue at which iteration budgets are at their floor: well before anyone is refused."""


class Admission:
    """Keeps what waits for the engine within ``limit``. For one thread: that of the event loop.

    Args:
        limit: most answers that may wait.
        queued: answers that wait in the engine.
        clock: seconds, monotonic.
    """

    def __init__(self, limit: int, queued: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._queued, self._clock = limit, queued, clock
        self._reserved = 0
        self._finished: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold room for ``count`` answers until they are in the engine's queue.

        Raises:
            QueueFull: there is not room for all of them.
        """
        missing = self._queued() + self._reserved + count - self.limit
        if missing > 0:
            raise QueueFull("the queue is full, try again later", self._retry_after_s(missing))
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count

    def depth(self, floor: float) -> float:
        """The share of its iteration budget that a request may keep now: from 1 while nothing waits, in
        proportion, down to ``floor`` when the queue is half full."""
        waiting = (self._queued() + self._reserved) / self.limit
        return 1 - (1 - floor) * min(1.0, waiting / _FULL_PRESSURE)

    def finished(self) -> None:
        """Note that an answer is done; unlike the rest, from any thread."""
        self._finished.append(self._clock())

    def _retry_after_s(self, missing: int) -> int:
        """Seconds in which the recent rate frees ``missing`` places."""
        while self._finished and self._finished[0] < self._clock() - _RECENT_S:
            self._finished.popleft()
        if not self._finished:
            return 1
        rate = len(self._finished) / max(self._clock() - self._finished[0], 1e-3)
        return max(1, min(_LONGEST_WAIT_S, math.ceil(missing / rate)))


def reduce_budget(request: Request, depth: float) -> Request:
    """The request with ``depth`` of its iteration budget, rounded up, and no less than its minimum; the same
    object where that changes nothing."""
    loop = request.loop
    most = max(loop.min_iterations, math.ceil(depth * loop.max_iterations))
    return request if most >= loop.max_iterations else replace(request, loop=replace(loop, max_iterations=most))
