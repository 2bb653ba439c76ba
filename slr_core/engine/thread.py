"""The thread that owns the model, and the queues by which other threads reach it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from slr_core.engine.core import Core
from slr_core.engine.sequence import Sequence
from slr_core.errors import EngineError

logger = logging.getLogger(__name__)
T = TypeVar("T")

EXIT_TIMEOUT_S = 10.0
"""How long the end of the process waits for the current step of an engine that was not closed."""


class EngineThread:
    """Steps a :class:`Core` while it has requests, on a thread of its own. It starts at once.

    Args:
        core: only this thread uses it from now on.
        after_step: called on the thread after every step.

    Attributes:
        last_progress: ``time.monotonic`` when the last step ended or the thread was last idle.
    """

    def __init__(self, core: Core, after_step: Callable[[], None]) -> None:
        self._core, self._after_step = core, after_step
        self._arrived: list[Sequence] = []
        self._commands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._closed = self._exiting = False
        self._process = os.getpid()
        self.last_progress = time.monotonic()
        _threads.add(self)
        self._thread = threading.Thread(target=self._run, name="slr-engine", daemon=True)
        self._thread.start()

    # -- called from other threads -----------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            EngineError: the engine is closed, or runs in another process.
        """
        self.check_process()
        with self._changed:
            self._check_open()
            if not self.busy:
                self.last_progress = time.monotonic()
            self._arrived.append(sequence)
            self._changed.notify()

    def call(self, command: Callable[[], T]) -> T:
        """Run ``command`` on the thread, between two steps, and return what it returns.

        Raises:
            EngineError: the engine is closed or runs in another process, or this is its thread.
        """
        self.check_may_wait()
        return self.post(command).result()

    def post(self, command: Callable[[], T]) -> Future[T]:
        """As :meth:`call`, without waiting.

        Raises:
            EngineError: the engine is closed or runs in another process.
        """
        self.check_process()
        done: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._commands.append((command, done))
            self._changed.notify()
        return done

    def check_process(self) -> None:
        """Check that this is the engine's process. Nothing else may be done first: another thread may have held a lock
        when the process was forked, and in the child nobody releases it.

        Raises:
            EngineError: it is a forked process.
        """
        if os.getpid() != self._process:
            raise EngineError("the engine does not run in this forked process: create a new one here")

    def check_may_wait(self) -> None:
        """Check that the caller may wait for the engine.

        Raises:
            EngineError: this is a forked process, or the engine's thread, which would wait for itself.
        """
        self.check_process()
        if threading.current_thread() is self._thread:
            raise EngineError("a callback runs on the engine's thread and must not wait for the engine")

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is shut down")

    @property
    def alive(self) -> bool:
        """Whether it accepts requests."""
        return os.getpid() == self._process and self._thread.is_alive() and not self._closed

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._arrived) or self._core.busy

    def waiting(self) -> list[Sequence]:
        """Requests without a slot.

        Raises:
            EngineError: the engine runs in another process.
        """
        self.check_process()
        with self._changed:
            return [*self._arrived, *self._core.scheduler.waiting]

    def sequences(self) -> list[Sequence]:
        """All requests, with and without a slot. Consistent only on the thread itself."""
        return [*self._arrived, *self._core.scheduler.waiting, *self._core.scheduler.running]

    def cancel_all(self) -> None:
        """Cancel all requests."""
        with suppress(EngineError):  # it is closed: nothing runs
            self.call(lambda: [sequence.future.cancel() for sequence in self.sequences()])

    def close(self, timeout: float | None = None) -> None:
        """Finish running requests, fail queued ones and end the thread; wait for that at most ``timeout`` seconds."""
        if os.getpid() != self._process:
            return  # nothing runs here
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def exit(self) -> None:
        """End the thread after the current step, because the process ends."""
        if self._thread.is_alive():
            self._exiting = True
            self.close(timeout=EXIT_TIMEOUT_S)

    # -- on the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = EngineError("the engine is shut down")
        try:
            while self._wait_for_work():
                self._core.step()
                self.last_progress = time.monotonic()
                self._after_step()
        except BaseException as fault:  # a step contains the errors of requests: this one is the engine's
            logger.exception("The engine has failed")
            error = EngineError(f"the engine has failed: {fault}")
        with self._changed:
            self._closed = True
            self._take_arrived()
            commands, self._commands = self._commands, []
        self._core.fail_all(error)
        for _, done in commands:
            done.set_exception(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is a request, and run commands meanwhile. False: the thread should end."""
        while not self._exiting:
            with self._changed:
                self._changed.wait_for(lambda: self.busy or self._commands or self._closed)
                self._take_arrived()
                commands, self._commands = self._commands, []
                closed = self._closed
            for command, done in commands:
                try:
                    done.set_result(command())
                except BaseException as error:  # raised in the thread that waits for the command
                    done.set_exception(error)
            if closed:
                self._core.fail_waiting(EngineError("the engine is shut down"))
            if self._core.busy:
                return True
            if closed:
                return False
        return False

    def _take_arrived(self) -> None:
        for sequence in self._arrived:
            self._core.add(sequence)
        self._arrived.clear()


_threads: WeakSet[EngineThread] = WeakSet()


@atexit.register
def _exit_all() -> None:
    # If the interpreter ends while a thread is inside torch, the process aborts and loses its exit status.
    for thread in list(_threads):
        thread.exit()
