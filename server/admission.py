"""Admission control: how many answers may wait, how the iteration budget shrinks meanwhile, and when a refused client
should retry."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from slr_core.types import Request

from .errors import QueueFull

_MAX_RETRY_AFTER_S = 60
_RATE_WINDOW_S = 60  # older answers say nothing about the current rate
_RATE_SAMPLES = 256
_FULL_PRESSURE = 0.5
"""Share of the queue at which iteration budgets reach their floor: well before requests are refused."""


class Admission:
    """Keeps the number of waiting answers within ``limit``. Not thread-safe: for the event loop's thread.

    Args:
        limit: maximum number of waiting answers.
        queued: returns the number of answers that wait in the engine.
        clock: returns seconds, monotonic.
    """

    def __init__(self, limit: int, queued: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._queued, self._clock = limit, queued, clock
        self._reserved = 0
        self._finished: deque[float] = deque(maxlen=_RATE_SAMPLES)

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Reserve room for ``count`` answers until they are in the engine's queue.

        Raises:
            QueueFull: there is no room for all of them.
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
        """The share of its iteration budget that a new request gets: 1 while nothing waits, and linearly less, down to
        ``floor``, until the queue is half full."""
        waiting = (self._queued() + self._reserved) / self.limit
        return 1 - (1 - floor) * min(1.0, waiting / _FULL_PRESSURE)

    def record_finished(self) -> None:
        """Count an answer that has finished. Thread-safe."""
        self._finished.append(self._clock())

    def _retry_after_s(self, missing: int) -> int:
        """Seconds in which the recent rate frees ``missing`` places."""
        while self._finished and self._finished[0] < self._clock() - _RATE_WINDOW_S:
            self._finished.popleft()
        if not self._finished:
            return 1
        rate = len(self._finished) / max(self._clock() - self._finished[0], 1e-3)
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(missing / rate)))


def reduce_budget(request: Request, depth: float) -> Request:
    """The request with ``depth`` of its iteration budget, rounded up and not below its minimum; the same object if
    nothing changes."""
    loop = request.loop
    budget = max(loop.min_iterations, math.ceil(depth * loop.max_iterations))
    return request if budget >= loop.max_iterations else replace(request, loop=replace(loop, max_iterations=budget))
