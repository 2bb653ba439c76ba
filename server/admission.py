"""Admission control: how many answers may wait, how the iteration budget shrinks meanwhile, and when a refused client
should retry."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from slr_core.types import Request

from .errors import QueueFull

_MAX_RETRY_AFTER_S = 60
_RATE_SAMPLES = 64
_FULL_PRESSURE = 0.5
"""Share of the queue at which iteration budgets reach their floor: well before requests are refused."""


class CompletionRate:
    """Finished answers per second, measured over the last answers and only while there was work. Thread-safe.

    Args:
        clock: returns seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, Lock()
        self._intervals: deque[float] = deque(maxlen=_RATE_SAMPLES)
        self._since = clock()
        """When the last answer finished, or when work arrived after that."""

    def record_arrival(self) -> None:
        """Record that work arrives at an idle engine: the time before does not count."""
        with self._lock:
            self._since = self._clock()

    def record_finished(self) -> None:
        """Record that an answer has finished."""
        with self._lock:
            now = self._clock()
            self._intervals.append(now - self._since)
            self._since = now

    def seconds_for(self, answers: int) -> float | None:
        """Seconds in which this number of answers finishes; ``None``: none has finished yet."""
        with self._lock:
            if not self._intervals:
                return None
            return answers * (sum(self._intervals) + self._clock() - self._since) / len(self._intervals)


class Admission:
    """Keeps the number of waiting answers within ``limit``. Not thread-safe: for the event loop's thread.

    Args:
        limit: maximum number of waiting answers.
        queued: returns the number of answers that wait in the engine, of each request at most as many as its argument.
        clock: returns seconds, monotonic.
        running: returns the number of answers that have a slot of the engine.
    """

    def __init__(
        self,
        limit: int,
        queued: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
        running: Callable[[], int] = lambda: 0,
    ) -> None:
        self.limit, self._queued, self._running = limit, queued, running
        self._reserved: list[int] = []
        self._rate = CompletionRate(clock)

    def check_room(self, count: int = 1) -> None:
        """Check that ``count`` answers may wait.

        Raises:
            QueueFull: there is no room for all of them.
        """
        missing = self._waiting(self.limit) + count - self.limit
        if missing > 0:
            raise QueueFull("the queue is full, try again later", self.retry_after_s(missing))

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Reserve room for ``count`` answers until they are in the engine's queue.

        Raises:
            QueueFull: there is no room for all of them.
        """
        self.check_room(count)
        if not self._waiting(self.limit) and not self._running():
            self._rate.record_arrival()
        self._reserved.append(count)
        try:
            yield
        finally:
            self._reserved.remove(count)

    def depth(self, floor: float, count: int) -> float:
        """The share of its iteration budget that a new request for ``count`` answers gets.

        It is 1 while nothing waits, and linearly less, down to ``floor``, until the answers that come before its last
        one are half a queue. As requests take turns, these are at most ``count`` of each waiting request.
        """
        return 1 - (1 - floor) * min(1.0, self._waiting(count) / self.limit / _FULL_PRESSURE)

    def _waiting(self, most_per_request: int) -> int:
        """Answers that wait in the engine or will, of each request at most so many."""
        return self._queued(most_per_request) + sum(min(count, most_per_request) for count in self._reserved)

    def record_finished(self) -> None:
        """Count an answer that has finished. Thread-safe."""
        self._rate.record_finished()

    def retry_after_s(self, missing: int) -> int:
        """Seconds in which the answers that wait now, and ``missing`` more, finish at the measured rate: whole, and
        from 1 to 60."""
        seconds = self._rate.seconds_for(self._waiting(self.limit) + missing)
        return 1 if seconds is None else max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds)))


def reduce_budget(request: Request, depth: float) -> Request:
    """The request with ``depth`` of its iteration budget, rounded up and not below its minimum; the same object if
    nothing changes."""
    loop = request.loop
    budget = max(loop.min_iterations, math.ceil(depth * loop.max_iterations))
    return request if budget >= loop.max_iterations else replace(request, loop=replace(loop, max_iterations=budget))
