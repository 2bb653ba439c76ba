"""The answers of one HTTP request while the engine works on them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from slr_core.engine import Engine, Event, FinishedEvent
from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.errors import DeadlineError
from slr_core.types import Request, Result

from .errors import TimedOut
from .protocol.schema import OutputEvent


def timeout_error(limit_s: float) -> TimedOut:
    """The error of a request that exceeds its time limit."""
    return TimedOut(f"no answer within {limit_s:g} seconds")


@asynccontextmanager
async def until_deadline(deadline: float, limit_s: float) -> AsyncIterator[None]:
    """Give up what runs inside at ``deadline`` (``time.monotonic``); ``limit_s`` is the same as a duration.

    Raises:
        TimedOut: the deadline has passed.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError as error:
        raise timeout_error(limit_s) from error


class AdmittedRequest(NamedTuple):
    """A request with the iteration budget that it gets."""

    request: Request
    budget_reduced: bool
    """Whether the budget is smaller than requested."""


class RequestGroup:
    """Requests in the engine, and an async iterator over their events that ends with their last result.

    A context manager: requests that are unfinished when it closes are cancelled, and their slots are free at the
    engine's next step.

    Args:
        engine: runs them.
        requests: in the order of their indices.
        loop_set: their loop adapter set.
        stream: yield iterations and tokens too, not only results.
        deadline: ``time.monotonic`` at which the group fails.
        limit_s: the same as a duration in seconds, for the error message.
        on_done: called once for each request that finished, failed or was dropped by the client, on the thread that
            ended it; not for those that end because the group fails.

    Raises:
        EngineError: the engine is closed.
        RequestError: a request is larger than a slot.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[AdmittedRequest],
        *,
        loop_set: LoopAdapterSet,
        stream: bool,
        deadline: float,
        limit_s: float,
        on_done: Callable[[Request, Future[Result]], None],
    ) -> None:
        self._engine, self._deadline, self._limit_s = engine, deadline, limit_s
        self._requests, self._on_done = requests, on_done
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._arrived: deque[tuple[int, Event | BaseException]] = deque()
        """What the event loop has not put into the queue yet."""
        self._is_waking = False
        """Whether the event loop will look at :attr:`_arrived`."""
        self._unfinished = len(requests)
        self._failed = False
        self._futures: list[Future[Result]] = []
        try:
            for index, (request, _) in enumerate(requests):
                future = engine.submit(
                    request,
                    loop_set=loop_set,
                    on_event=partial(self._on_event, index) if stream else None,
                    deadline=deadline,
                    group=self,
                )
                self._futures.append(future)
                future.add_done_callback(partial(self._on_future_done, index))
        except BaseException:
            self.close()
            raise

    # -- on the engine's thread ---------------------------------------------------------------------

    def _on_event(self, index: int, event: Event) -> None:
        if not isinstance(event, FinishedEvent):  # results come with the future, as errors do
            self._put(index, event)

    def _on_future_done(self, index: int, future: Future[Result]) -> None:
        if not (future.cancelled() and self._failed):
            self._on_done(self._requests[index].request, future)
        if not future.cancelled():
            self._put(index, future.exception() or FinishedEvent(future.result()))

    def _put(self, index: int, item: Event | BaseException) -> None:
        self._arrived.append((index, item))
        # One call for all events of a step: each is a system call, after which the engine waits for the interpreter's
        # lock. A closed event loop means that the server has shut down.
        if not self._is_waking and not self._loop.is_closed():
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._take_arrived)

    # -- on the event loop --------------------------------------------------------------------------

    def _take_arrived(self) -> None:
        self._is_waking = False  # before the last look, so that nothing is left behind
        while self._arrived:
            self._queue.put_nowait(self._arrived.popleft())

    @property
    def started(self) -> bool:
        """Whether any of its requests has got a slot."""
        return not self._engine.waiting.issuperset(self._futures)

    def fail(self, error: Exception) -> None:
        """Raise this error in the iteration."""
        self._queue.put_nowait((0, error))

    def __aiter__(self) -> AsyncIterator[OutputEvent]:
        return self

    async def __anext__(self) -> OutputEvent:
        if not self._unfinished:
            raise StopAsyncIteration
        # The engine checks the deadline too, but not while it is stalled.
        async with until_deadline(self._deadline, self._limit_s):
            index, item = await self._queue.get()
        if isinstance(item, DeadlineError):
            raise timeout_error(self._limit_s) from item
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, FinishedEvent):
            self._unfinished -= 1
        request, budget_reduced = self._requests[index]
        return OutputEvent(index, request, item, budget_reduced)

    def close(self) -> None:
        """Cancel the requests that are unfinished."""
        for future in self._futures:
            future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A client that leaves ends the task: CancelledError and GeneratorExit are no Exceptions.
        self._failed = isinstance(error, Exception)
        self.close()
