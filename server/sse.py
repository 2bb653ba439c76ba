"""Server-sent events as plain ASGI.

The first event is awaited before the headers are sent, so that early errors have their own status. A stream that fails
ends with an error event and without the final chunk of HTTP, so that it never looks complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, ClientGone, to_problem
from .observability.request_stats import RequestStats, request_stats

T = TypeVar("T")
logger = logging.getLogger(__name__)

PING_S = 15.0
"""Seconds without an event after which a comment is sent to keep the connection alive."""
COMMENT = b": working\n\n"


def frame(data: BaseModel | str, event: str | None = None, exclude: set[str] | None = None) -> bytes:
    """One event as bytes, without the fields ``exclude``."""
    text = data if isinstance(data, str) else data.model_dump_json(exclude=exclude)
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; if the client disconnects first, cancel it.

    Raises:
        ClientGone: the client disconnected.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client closed the connection")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends frames as they come, and closes their source when the client disconnects.

    Create one with :meth:`start`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, frames: AsyncGenerator[bytes], write_timeout_s: float, error_event: str | None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.first, self.frames = first, frames
        self.write_timeout_s, self.error_event = write_timeout_s, error_event

    @classmethod
    async def start(
        cls, receive: Receive, frames: AsyncGenerator[bytes], *, write_timeout_s: float, error_event: str | None
    ) -> EventStream:
        """Wait for the first frame. An error until then is an ordinary error response with its own status.

        Args:
            receive: the request's ASGI ``receive``.
            frames: the encoded events; closed in any case.
            write_timeout_s: seconds a client may take to read, while the connection's buffer is full.
            error_event: name of the event that reports an error; ``None``: the event has no name.
        """
        try:
            first = await while_connected(receive, _next(frames))
        except BaseException:
            await frames.aclose()
            raise
        return cls(first, frames, write_timeout_s, error_event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        stats = request_stats(scope)
        async with aclosing(self.frames):
            try:
                await while_connected(receive, self._send(send, stats))
            except ClientGone:
                stats.status = CLIENT_CLOSED_REQUEST

    async def _send(self, send: Send, stats: RequestStats) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self.write_timeout_s):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError as error:
                raise ClientGone("the client does not read the response") from error

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self.first)
        try:
            async for each in _with_pings(self.frames):
                await write(each)
        except ClientGone:
            raise
        except Exception as error:
            problem = to_problem(error)
            if problem.status == 500:
                logger.error("request %s failed while streaming", stats.request_id, exc_info=error)
            stats.status, stats.error = problem.status, problem.code
            await write(frame(problem.body(), self.error_event))
            return
        await write(b"", more=False)


async def _next(frames: AsyncGenerator[bytes]) -> bytes:
    return await anext(frames)


async def _with_pings(frames: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The frames, with a comment whenever none has come for :data:`PING_S`."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(frames))
            done, _ = await asyncio.wait((pending,), timeout=PING_S)
            if not done:
                yield COMMENT
                continue
            try:
                each = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield each
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
