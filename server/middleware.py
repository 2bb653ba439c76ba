"""Middleware around every request, as plain ASGI: middleware that buffers would hide a client's disconnect."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import (
    CLIENT_CLOSED_REQUEST,
    SHUTTING_DOWN,
    PreflightRefused,
    TooManyHeaders,
    Unavailable,
    send_error,
    to_problem,
)
from .observability.access_log import AccessLogEntry, log_access
from .observability.metrics import ENDPOINTS, Metrics
from .observability.request_stats import request_stats

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
SERVER_TIMING = "Server-Timing"
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 << 10
"""Limits of a request's headers. :mod:`slr_server.connection` has a higher one."""
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Gives each request an id, statistics, metrics and a log line, and answers unexpected exceptions with 500.

    Args:
        metrics: count the requests.
        is_draining: returns whether the server is shutting down. Requests that are cancelled then get 503.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self.app, self.metrics, self.is_draining = app, metrics, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        stats = request_stats(scope)
        if not stats.request_id:  # else the connection has refused the rest of the request
            stats.request_id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        # The status if the client disconnects, or the server gives up, before the response starts.
        status = CLIENT_CLOSED_REQUEST
        started = False
        counted = scope["path"] in ENDPOINTS
        if counted:
            self.metrics.request_started()

        async def respond(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = stats.request_id
                if stats.timings is not None and not stats.stream:
                    headers[SERVER_TIMING] = ", ".join(
                        f"{name.removesuffix('_s')};dur={1000 * seconds:.3f}"
                        for name, seconds in vars(stats.timings).items()
                    )
            await send(message)

        try:
            await self.app(scope, receive, respond)
        except asyncio.CancelledError:  # by uvicorn, whose own response would have no error body
            if started or not self.is_draining():
                raise
            await send_error(Unavailable(SHUTTING_DOWN), scope, receive, respond)
        except Exception as error:
            logger.exception("request %s failed", stats.request_id)
            status = 500
            if not started:
                await send_error(error, scope, receive, respond)
        finally:
            status = stats.status or status
            if counted:
                self.metrics.request_finished(scope["path"], status)
            entry = AccessLogEntry(
                client=scope["client"][0] if scope.get("client") else "-",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_s=time.monotonic() - stats.arrived_at,
                stats=stats,
            )
            log_access(entry)


class HeaderLimit:
    """Refuses requests with too many or too large headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            headers = scope["headers"]
            if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
                error = TooManyHeaders(
                    f"a request may have at most {MAX_HEADERS} headers, and {MAX_HEADER_BYTES} bytes of headers"
                )
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


class IgnoreRange:
    """Drops the header ``Range``, as a server may: Starlette refuses an invalid one without the error body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"range"]}
        await self.app(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def respond(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, respond)


class Preflight(CORSMiddleware):
    """Starlette's CORS middleware; a preflight that it refuses gets the error body."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refused = to_problem(PreflightRefused(bytes(response.body).decode())).response()
        refused.headers.update(
            {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        )
        return refused
