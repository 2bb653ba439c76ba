"""Server-sent events, as plain ASGI: the first event before the headers, a broken stream never a clean end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, ClientGone, describe
from .observability.request_stats import current

T = TypeVar("T")
logger = logging.getLogger(__name__)

PING_S = 15.0
"""Seconds of silence after which a comment keeps the connection alive."""
COMMENT = b": working\n\n"


def frame(data: BaseModel | str, event: str | None = None) -> bytes:
    """One event."""
    text = data if isinstance(data, str) else data.model_dump_json()
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text}\n\n".encode()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; when the client leaves first, cancel it.

    Raises:
        ClientGone: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client closed the connection")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends frames as they come, and closes their source when the client leaves.

    Make one with :meth:`begin`.
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
    async def begin(
        cls, receive: Receive, frames: AsyncGenerator[bytes], *, write_timeout_s: float, error_event: str | None = None
    ) -> EventStream:
        """Wait for the first frame: what goes wrong until then is an ordinary error with its own status.

        Args:
            receive: the request's.
            frames: the events; closed in any case.
            write_timeout_s: seconds that the client may leave the connection full.
            error_event: name of the event that tells of an error; without one it is nameless.
        """
        try:
            first = await while_connected(receive, _next(frames))
        except BaseException:
            await frames.aclose()
            raise
        return cls(first, frames, write_timeout_s, error_event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. A stream that fails ends with an event that says so, and without the end that HTTP asks for."""
        async with aclosing(self.frames):
            try:
                await while_connected(receive, self._send(send))
            except ClientGone:
                current().status = CLIENT_CLOSED_REQUEST

    async def _send(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self.write_timeout_s):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError as error:
                raise ClientGone("the client does not read") from error

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await write(self.first)
        try:
            async for each in _pinged(self.frames):
                await write(each)
        except ClientGone:
            raise
        except Exception as error:
            problem = describe(error)
            if problem.status == 500:
                logger.error("a stream failed", exc_info=error)
            stats = current()
            stats.status, stats.error = problem.status, problem.code
            await write(frame(problem.body(), self.error_event))
            return
        await write(b"", more=False)


async def _next(frames: AsyncGenerator[bytes]) -> bytes:
    return await anext(frames)


async def _pinged(frames: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The frames, and a comment wherever none has come for a while."""
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
