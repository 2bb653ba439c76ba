"""Daemon threads for work that may take long or never end: the end of the process does not wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar
from weakref import WeakSet

T = TypeVar("T")

_threads: WeakSet[threading.Thread] = WeakSet()


def run_in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Start ``work`` on a daemon thread. Cancelling the future does not end the thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = _result(future, work())
        except BaseException as error:  # raised where the future is awaited
            settle = _error(future, error)
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(settle)

    start_daemon(run)
    return future


class SerialWorker:
    """Runs work on a thread, one piece at a time, in the order in which it arrives.

    Pure Python on several threads at once would make the event loop and the engine wait for the interpreter's lock as
    many times as there are threads.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self.awaited = 0
        """Number of calls of :meth:`run` that have not returned."""

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` when its turn comes.

        If this is cancelled, work that has not begun is dropped; the next waits for work that has begun.

        Args:
            work: runs on a daemon thread.
        """
        self.awaited += 1
        try:
            await self._turn.acquire()
            try:
                running = run_in_daemon(work)
            except BaseException:  # no thread can be started
                self._turn.release()
                raise
            running.add_done_callback(lambda _: self._turn.release())
            return await asyncio.shield(running)
        finally:
            self.awaited -= 1


def start_daemon(work: Callable[[], None]) -> threading.Thread:
    """Start ``work`` on a daemon thread that :func:`unfinished` knows."""
    thread = threading.Thread(target=work, name="slr-daemon", daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def unfinished() -> bool:
    """Whether any of the threads still runs: the interpreter must then end without cleaning up after it."""
    return any(thread.is_alive() for thread in _threads)


def _result(future: asyncio.Future[T], result: T) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_result(result)


def _error(future: asyncio.Future[T], error: BaseException) -> Callable[[], None]:
    return lambda: None if future.done() else future.set_exception(error)
