"""Maps exceptions to error responses: the only place that knows HTTP statuses and error codes.

Client errors name their field. Server errors reveal no details: those are in the log, under the request's id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from slr_core.errors import DeadlineError, RequestError, SLRError

from .observability.request_stats import request_stats
from .protocol.schema import ErrorDetail, ErrorResponse
from .settings import plain_message

CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose client disconnected; it is never sent."""

SHUTTING_DOWN = "the server is shutting down"
"""Message of requests that come too late."""

_INVALID, _SERVER = "invalid_request_error", "server_error"
_MAX_REPORTED_ERRORS, _MAX_NAME_LENGTH = 5, 100


class InvalidHTTP(SLRError):
    """The bytes on a connection are not a valid HTTP request."""


class HeadersTooSlow(SLRError):
    """The headers did not arrive in time."""


class InvalidJSON(SLRError):
    """The body is not valid JSON."""


class UnsupportedMediaType(SLRError):
    """The content type is not JSON, or the body is compressed."""


class BodyTooLarge(SLRError):
    """The body is larger than the limit."""


class BodyTooSlow(SLRError):
    """The body did not arrive in time."""


class TooManyHeaders(SLRError):
    """The headers are larger than the limit."""


class Unauthorized(SLRError):
    """The request has no valid key for this path."""


class PreflightRefused(SLRError):
    """A page of this origin may not send such a request."""


class UnknownHost(SLRError):
    """The Host header names another host than this server."""


class Forbidden(SLRError):
    """The operation is disabled on this server."""


class NotFound(RequestError):
    """The named object does not exist."""


class ModelNotFound(NotFound):
    """No model of this name is served."""


class Conflict(SLRError):
    """The operation conflicts with the server's current state."""


class Overloaded(SLRError):
    """The server has no room for the request.

    Attributes:
        retry_after_s: estimated seconds until there is room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """Too many answers wait, or too many requests are in progress."""


class TooManyConnections(Overloaded):
    """There are too many connections."""


class Unavailable(SLRError):
    """The engine is loading, stopped or stalled; another replica may answer."""


class TimedOut(SLRError):
    """The request exceeded its time limit."""


class ClientGone(SLRError):
    """The client closed the connection before it got its answer."""


_KINDS: dict[type[Exception], tuple[int, str, str]] = {
    RequestError: (400, _INVALID, "invalid_value"),
    InvalidHTTP: (400, _INVALID, "invalid_http"),
    InvalidJSON: (400, _INVALID, "invalid_json"),
    PreflightRefused: (400, _INVALID, "cors_refused"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "forbidden"),
    NotFound: (404, _INVALID, "not_found"),
    ModelNotFound: (404, _INVALID, "model_not_found"),  # OpenAI's code
    HeadersTooSlow: (408, "timeout_error", "headers_timeout"),
    BodyTooSlow: (408, "timeout_error", "body_timeout"),
    Conflict: (409, _INVALID, "conflict"),
    BodyTooLarge: (413, _INVALID, "body_too_large"),
    UnsupportedMediaType: (415, _INVALID, "unsupported_media_type"),
    TooManyHeaders: (431, _INVALID, "headers_too_large"),
    UnknownHost: (421, _INVALID, "unknown_host"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    ClientGone: (CLIENT_CLOSED_REQUEST, _INVALID, "client_closed_request"),
    TooManyConnections: (503, "unavailable_error", "too_many_connections"),
    Unavailable: (503, "unavailable_error", "unavailable"),
    TimedOut: (504, "timeout_error", "timeout"),
    DeadlineError: (504, "timeout_error", "timeout"),
}
"""Status, type and code of errors whose message may be sent to the client. All others are a plain 500."""

_HTTP_ERRORS: dict[int, tuple[str, str]] = {
    404: ("not_found", "no such path"),
    405: ("method_not_allowed", "this path does not take that method"),
}

_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_MESSAGES = {
    "extra_forbidden": "unknown field",
    "missing": "required",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
}


@dataclass(frozen=True)
class Problem:
    """The content of an error response."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> ErrorResponse:
        """The error body."""
        return ErrorResponse(error=ErrorDetail(type=self.type, message=self.message, param=self.param, code=self.code))

    def response(self) -> Response:
        """The HTTP response."""
        return Response(
            self.body().model_dump_json(), self.status, headers=dict(self.headers), media_type="application/json"
        )


async def send_error(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with the response for an exception; ASGI."""
    problem = to_problem(error)
    request_stats(scope).error = problem.code
    await problem.response()(scope, receive, send)


def to_problem(error: Exception) -> Problem:
    """The error response for an exception."""
    if isinstance(error, RequestValidationError):
        return _validation_problem(error.errors())
    if isinstance(error, HTTPException):
        return _http_problem(error)
    for kind in type(error).__mro__:
        if kind in _KINDS:
            status, family, code = _KINDS[kind]
            param = error.param if isinstance(error, RequestError) else None
            headers = {}
            if isinstance(error, Overloaded):
                headers["Retry-After"] = str(error.retry_after_s)
            elif isinstance(error, Unauthorized):
                headers["WWW-Authenticate"] = "Bearer"
            return Problem(status, family, code, str(error), param, headers)
    return Problem(500, _SERVER, "internal_error", "the server failed to answer this request")


def _http_problem(error: HTTPException) -> Problem:
    code, message = _HTTP_ERRORS.get(error.status_code, ("http_error", str(error.detail)))
    family = _SERVER if error.status_code >= 500 else _INVALID
    return Problem(error.status_code, family, code, message, headers=error.headers or {})


def _validation_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    first = errors[0]
    if tuple(first["loc"]) == ("body",):
        what = first["msg"] if first["type"] == "too_many_fields" else "must be a JSON object"
        return Problem(400, _INVALID, "invalid_value", f"the body {what}")
    messages = [f"{_param(error)}: {_message(error)}" for error in errors[:_MAX_REPORTED_ERRORS]]
    if len(errors) > _MAX_REPORTED_ERRORS:
        messages.append(f"and {len(errors) - _MAX_REPORTED_ERRORS} more")
    code = _CODES.get(first["type"], "invalid_value")
    return Problem(400, _INVALID, code, "; ".join(messages), _param(first))


def _param(error: Mapping[str, Any]) -> str:
    # loc starts with "body". The rest may be names that the client chose, of any length.
    return ".".join(map(str, error["loc"][1:]))[:_MAX_NAME_LENGTH]


def _message(error: Mapping[str, Any]) -> str:
    message: str = _MESSAGES.get(error["type"], error["msg"])
    return plain_message(message)


async def _handle(request: Request, error: Exception) -> Response:
    problem = to_problem(error)
    request_stats(request.scope).error = problem.code
    response = problem.response()
    if problem.status == 405:
        # Starlette names the methods of one route only, and a path may have several routes.
        response.headers["Allow"] = ", ".join(_methods(request)) or response.headers.get("Allow", "")
    return response


def _methods(request: Request) -> list[str]:
    app: FastAPI = request.app
    paths = app.openapi()["paths"]
    matching = (operations for path, operations in paths.items() if compile_path(path)[0].match(request.url.path))
    methods = {method.upper() for operations in matching for method in operations}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def install_handlers(app: FastAPI) -> None:
    """Let the application answer every deliberate error with the error body.

    Unexpected exceptions are answered in :class:`slr_server.middleware.RequestContext`, outside of all others.
    """
    for kind in (SLRError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)
