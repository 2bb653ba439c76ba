"""What wraps every request, as plain ASGI: a wrapper that buffers would hide a client's disconnection."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CLIENT_CLOSED_REQUEST, BodyTooLarge, describe
from server.metrics import ENDPOINTS, Metrics

access = logging.getLogger("slr.access")
logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestContext:
    """Gives each request an id, one log line and its count, and answers for whatever nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
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
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self.app(scope, receive, respond)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            status = 500
            if not started:
                await describe(error).response()(scope, receive, respond)
        finally:
            if counted:
                self.metrics.answered(scope["path"], status)
            client = scope["client"][0] if scope.get("client") else "-"
            milliseconds = 1000 * (time.perf_counter() - began)
            # The path arrives decoded: quoted again it cannot forge a second line.
            access.info(
                "%s %s %s %d %.1fms %s", client, scope["method"], quote(scope["path"]), status, milliseconds, request_id
            )


class BodyLimit:
    """Reads the body ahead of the application, and refuses it when it is over ``limit`` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > self.limit
        chunks: list[bytes] = []
        size, more = 0, True
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            too_large = size > self.limit
        if too_large:
            error = BodyTooLarge(f"the body must be at most {self.limit} bytes")
            await describe(error).response()(scope, receive, send)
            return
        body: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            message, body = body, None
            return await receive() if message is None else message

        await self.app(scope, replay, send)
