"""What wraps every request, as plain ASGI: a wrapper that buffers would hide a client's disconnection."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_CLOSED_REQUEST, BodyTooLarge, BodyTooSlow, TooManyHeaders, describe
from .observability import request_stats as stats
from .observability.access_log import AccessLogEntry, log_access
from .observability.metrics import ENDPOINTS, Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
SERVER_TIMING = "Server-Timing"
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 << 10
"""What a request's headers may be; far beyond, the HTTP parser itself hangs up."""
BODY_TIMEOUT_S = 30.0
"""Seconds for a body to arrive."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Gives each request an id, one log line, its count and its span, and answers for whatever nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, trace: Callable[[AccessLogEntry], None] | None = None) -> None:
        self.app, self.metrics, self.trace = app, metrics, trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, clock = time.time_ns(), time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        known = stats.begin()
        # Stands if the client leaves, or the server gives up, before a response has begun.
        status = CLIENT_CLOSED_REQUEST
        started = False
        counted = scope["path"] in ENDPOINTS
        if counted:
            self.metrics.began()

        async def respond(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                sent = MutableHeaders(scope=message)
                sent[REQUEST_ID] = request_id
                if known.timings is not None and not known.stream:
                    sent[SERVER_TIMING] = ", ".join(
                        f"{name.removesuffix('_s')};dur={1000 * seconds:.3f}"
                        for name, seconds in vars(known.timings).items()
                    )
            await send(message)

        try:
            await self.app(scope, receive, respond)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            status = 500
            if not started:
                await describe(error).response()(scope, receive, respond)
        finally:
            status = known.status or status
            if counted:
                self.metrics.answered(scope["path"], status)
            entry = AccessLogEntry(
                request_id=request_id,
                client=scope["client"][0] if scope.get("client") else "-",
                method=scope["method"],
                path=scope["path"],
                status=status,
                began_ns=began,
                duration_s=time.perf_counter() - clock,
                traceparent=headers.get("traceparent"),
                stats=known,
            )
            log_access(entry)
            if counted and self.trace is not None:
                self.trace(entry)


class HeaderLimit:
    """Refuses a flood of headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            headers = scope["headers"]
            if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
                error = TooManyHeaders(f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together are taken")
                await describe(error).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Reads the body ahead of the application, and refuses it when it is over ``limit`` bytes or takes too long."""

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self.app, self.limit, self.timeout_s = app, limit, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(Headers(scope=scope).get("content-length", ""), receive)
        except TimeoutError:
            error = BodyTooSlow(f"the body must arrive within {self.timeout_s:g} seconds")
            await describe(error).response()(scope, receive, send)
            return
        except BodyTooLarge as too_large:
            await describe(too_large).response()(scope, receive, send)
            return
        if body is None:
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            given, message = message, None
            return await receive() if given is None else given

        await self.app(scope, replay, send)

    async def _read(self, declared: str, receive: Receive) -> bytes | None:
        """The body; ``None`` where the client left before its end."""
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
        if received > self.limit:
            raise BodyTooLarge(f"the body must be at most {self.limit} bytes")
        return b"".join(chunks)
