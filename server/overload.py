"""What requests may hold of the server: unfinished bodies, and places among the requests in progress.

A request beyond a limit is refused before its body is read.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .admission import Admission
from .auth import PROBES
from .errors import BodyTooLarge, BodyTooSlow, Overloaded, QueueFull, TooManyConnections, send_error
from .observability.metrics import ENDPOINTS
from .observability.request_stats import request_stats

GRADE = "/grade"
"""The path that grades answers."""
_LARGEST_BODIES = 64
"""Unfinished bodies hold at most this many times the maximum size of one."""
MAX_GRADINGS = 16
"""Requests to grade answers, in progress or waiting. Each takes seconds at most."""


class RequestLimit:
    """Keeps the number of requests of one kind whose body has arrived within ``limit``.

    Args:
        limit: maximum number of requests in progress.
        admission: of requests that run the model: tells whether the queue is full, and when a refused client should
            retry. ``None``: for others.
    """

    def __init__(self, limit: int, admission: Admission | None = None) -> None:
        self.limit, self._admission = limit, admission
        self.in_progress = 0

    def check(self) -> None:
        """Check that a request may begin.

        Raises:
            QueueFull: the queue is full, or there are too many requests.
        """
        if self._admission is not None:
            self._admission.check_room()
        if self.in_progress >= self.limit:
            raise QueueFull("too many requests in progress, try again later", self.retry_after_s())

    def retry_after_s(self) -> int:
        """Seconds until there should be room for one more request."""
        if self._admission is None:
            return 1
        return self._admission.retry_after_s(max(1, self.in_progress + 1 - self.limit))

    def begin(self) -> None:
        """Count a request; :meth:`end` must follow.

        Raises:
            QueueFull: as :meth:`check`.
        """
        self.check()
        self.in_progress += 1

    def end(self) -> None:
        """Stop counting a request."""
        self.in_progress -= 1


class LimitsByPath:
    """The limits of the paths whose requests take more than a few milliseconds.

    Args:
        model: of requests that run the model.
    """

    def __init__(self, model: RequestLimit) -> None:
        self.model, self._grade = model, RequestLimit(MAX_GRADINGS)

    def find(self, path: str) -> RequestLimit | None:
        """The limit that a request to this path has; ``None``: it has none."""
        if path in ENDPOINTS:
            return self.model
        return self._grade if path == GRADE else None


class EarlyRefusal:
    """Refuses a request before its body is read, if the server has no room for it, or if there are too many connections
    and it is no health check.

    Args:
        limits: of the server.
    """

    def __init__(self, app: ASGIApp, limits: LimitsByPath) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            try:
                if request_stats(scope).probes_only and scope["path"] not in PROBES:
                    raise TooManyConnections("too many connections, try again later", self.limits.model.retry_after_s())
                if limit := self.limits.find(scope["path"]):
                    limit.check()
            except Overloaded as error:
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


class RequestCount:
    """Counts a request that has a limit once its body has arrived: a slow body keeps nobody out.

    Args:
        limits: of the server.
    """

    def __init__(self, app: ASGIApp, limits: LimitsByPath) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        limit = self.limits.find(scope["path"]) if scope["type"] == "http" else None
        if limit is None:
            await self.app(scope, receive, send)
            return
        try:
            limit.begin()
        except QueueFull as error:
            await send_error(error, scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            limit.end()


class BodyLimit:
    """Reads the body before the application does. Refuses it if it is too large or takes too long.

    Unfinished bodies together hold at most 64 times the maximum size of one. Beyond that, the one that has been
    arriving longest is refused.

    Args:
        limit: maximum size of a body, in bytes.
        timeout_s: seconds in which a body must arrive.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self.app, self.limit, self.timeout_s = app, limit, timeout_s
        self._arriving: dict[asyncio.Timeout, int] = {}
        """Bytes of each unfinished body, the oldest first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self.app(scope, receive, send)
            return
        started_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self.timeout_s) as timeout:
                self._arriving[timeout] = 0
                try:
                    body = await self._read(Headers(scope=scope).get("content-length", ""), receive, timeout)
                finally:
                    del self._arriving[timeout]
        except TimeoutError:
            late = asyncio.get_running_loop().time() >= started_at + self.timeout_s
            limit = (
                f"within {self.timeout_s:g} seconds" if late else "faster: unfinished bodies fill the server's memory"
            )
            await send_error(BodyTooSlow(f"the body must arrive {limit}"), scope, receive, send)
            return
        except BodyTooLarge as too_large:
            await send_error(too_large, scope, receive, send)
            return
        if body is None:
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            given, message = message, None
            return await receive() if given is None else given

        await self.app(scope, replay, send)

    async def _read(self, declared: str, receive: Receive, timeout: asyncio.Timeout) -> bytes | None:
        """The body; ``None`` if the client disconnected before its end."""
        size = int(declared) if declared.isdecimal() else 0
        chunks: list[bytes] = []
        received, more = 0, True
        while more:
            if max(size, received) > self.limit:
                raise BodyTooLarge(f"the body must be at most {self.limit} bytes")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            received += len(chunks[-1])
            more = message.get("more_body", False)
            self._arriving[timeout] = received
            self._refuse_oldest()
        if received > self.limit:
            raise BodyTooLarge(f"the body must be at most {self.limit} bytes")
        return b"".join(chunks)

    def _refuse_oldest(self) -> None:
        excess = sum(self._arriving.values()) - _LARGEST_BODIES * self.limit
        for timeout, held in self._arriving.items():
            if excess <= 0:
                return
            excess -= held
            if not timeout.expired():
                timeout.reschedule(0)
