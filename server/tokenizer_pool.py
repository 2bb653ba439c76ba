"""The threads that tokenize: large prompts have their own, so that small ones do not wait for them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

LARGE_CHARACTERS = 16_384
"""Characters from which a request is a large one."""
_SMALL_THREADS, _LARGE_THREADS = 2, 1


@dataclass(eq=False)
class _Job:
    """Work for a thread, and the future of the event loop that waits for it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any]
    arrived_at: float = field(default_factory=time.monotonic)


class TokenizerPool:
    """Runs work on daemon threads. For one event loop; the threads start with the first work."""

    def __init__(self) -> None:
        self._queues: tuple[SimpleQueue[_Job | None], SimpleQueue[_Job | None]] = SimpleQueue(), SimpleQueue()
        self._threads = 0
        self._waiting: dict[_Job, None] = {}
        """Jobs that no thread has begun, the oldest first."""
        self._running: dict[_Job, None] = {}

    async def run(self, work: Callable[[], T], characters: int) -> T:
        """Run ``work`` on a thread and return what it returns.

        If this is cancelled, work that has not begun is dropped; work that has begun goes on.

        Args:
            work: tokenizes.
            characters: how many.
        """
        if not self._threads:
            self._start()
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._waiting[job] = None
        self._queues[characters >= LARGE_CHARACTERS].put(job)
        try:
            result: T = await job.future
            return result
        finally:
            self._waiting.pop(job, None)

    @property
    def lag_s(self) -> float:
        """Seconds since the arrival of the oldest work that is not finished."""
        return _age(self._running, self._waiting)

    @property
    def waiting_s(self) -> float:
        """Seconds since the arrival of the oldest work that no thread has begun."""
        return _age(self._waiting)

    def close(self) -> None:
        """End the threads after their current work."""
        for queue, threads in zip(self._queues, (_SMALL_THREADS, _LARGE_THREADS), strict=True):
            for _ in range(threads if self._threads else 0):
                queue.put(None)

    def _start(self) -> None:
        for queue, threads in zip(self._queues, (_SMALL_THREADS, _LARGE_THREADS), strict=True):
            for _ in range(threads):
                self._threads += 1
                threading.Thread(target=self._work, args=(queue,), name="slr-tokenize", daemon=True).start()

    def _work(self, queue: SimpleQueue[_Job | None]) -> None:
        while (job := queue.get()) is not None:
            if job.future.done():  # nobody waits for it
                continue
            loop = job.future.get_loop()
            result, error = None, None
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._begin, job)
            try:
                result = job.work()
            except Exception as raised:
                error = raised
            except BaseException as raised:  # a panic of the tokenizer: it must not end the server's task
                error = RuntimeError(f"tokenizing failed: {raised!r}")
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._finish, job, result, error)

    def _begin(self, job: _Job) -> None:
        self._waiting.pop(job, None)
        self._running[job] = None

    def _finish(self, job: _Job, result: Any, error: Exception | None) -> None:
        self._running.pop(job, None)
        if job.future.done():
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)


def _age(*jobs: dict[_Job, None]) -> float:
    oldest = min((job.arrived_at for each in jobs for job in each), default=None)
    return 0.0 if oldest is None else time.monotonic() - oldest
