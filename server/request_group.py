"""The answers of one HTTP request while the engine works on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from slr_core.engine import Engine, Event, FinishedEvent
from slr_core.errors import DeadlineError
from slr_core.types import Request, Result

from .errors import TimedOut
from .observability.request_stats import current


def timeout_error(limit_s: float) -> TimedOut:
    """The error of a request that was not answered within its limit."""
    return TimedOut(f"no answer within {limit_s:g} seconds")


class OutputEvent(NamedTuple):
    """Something that happened to an answer."""

    answer: int
    """Its index."""
    event: Event
    reduced: bool
    """Whether the answer runs on a smaller iteration budget than it asked for."""


class RequestGroup:
    """Requests in the engine, and what it tells of them: an async iterator that ends with their last result.

    A context manager: whatever is left when it closes is cancelled, and its slots are free at the engine's
    next step.

    Args:
        engine: that runs them.
        requests: in the order of their indices, each with whether its budget was reduced.
        loop_set: by which they were planned.
        every: tell of iterations and tokens too, not of results alone.
        deadline: ``time.monotonic`` at which it fails.
        limit_s: how long that is, for the message.

    Raises:
        EngineError: the engine is closed.
        RequestError: a request is larger than a slot.
    """

    def __init__(
        self,
        engine: Engine,
        requests: list[tuple[Request, bool]],
        *,
        loop_set: str | None,
        every: bool,
        deadline: float,
        limit_s: float,
    ) -> None:
        self._engine, self._deadline, self._limit_s = engine, deadline, limit_s
        self._loop = asyncio.get_running_loop()
        self._reduced = [reduced for _, reduced in requests]
        self._arrived: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._unfinished = len(requests)
        self.futures: list[Future[Result]] = []
        try:
            for index, (request, _) in enumerate(requests):
                future = engine.submit(
                    request,
                    loop_set=loop_set,
                    on_event=partial(self._hear, index) if every else None,
                    deadline=deadline,
                )
                self.futures.append(future)
                future.add_done_callback(partial(self._settled, index))
        except BaseException:
            self.close()
            raise

    # -- on the engine's thread ---------------------------------------------------------------------

    def _hear(self, index: int, event: Event) -> None:
        if not isinstance(event, FinishedEvent):  # which comes with the future, as errors do
            self._tell(index, event)

    def _settled(self, index: int, future: Future[Result]) -> None:
        if not future.cancelled():
            self._tell(index, future.exception() or FinishedEvent(future.result()))

    def _tell(self, index: int, what: Event | BaseException) -> None:
        # The loop may be closed by now: then there is nobody to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, what))

    # -- on the event loop --------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether any of its answers got a slot."""
        return not self._engine.waiting.issuperset(self.futures)

    def abort(self, error: Exception) -> None:
        """Let whoever waits for it have this error."""
        self._arrived.put_nowait((0, error))

    def __aiter__(self) -> AsyncIterator[OutputEvent]:
        return self

    async def __anext__(self) -> OutputEvent:
        if not self._unfinished:
            raise StopAsyncIteration
        try:
            # The engine keeps the deadline as well, but an engine that is stuck keeps none.
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                index, what = await self._arrived.get()
        except TimeoutError as error:
            raise timeout_error(self._limit_s) from error
        if isinstance(what, DeadlineError):
            raise timeout_error(self._limit_s) from what
        if isinstance(what, BaseException):
            raise what
        if isinstance(what, FinishedEvent):
            self._unfinished -= 1
            current().results.append(what.result)
        return OutputEvent(index, what, self._reduced[index])

    def close(self) -> None:
        """Cancel what is left."""
        for future in self.futures:
            future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
