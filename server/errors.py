"""From exceptions to error responses: the one place that knows which failure is which status.

Errors of the client name their field. Errors of the server say nothing about its insides: those are in
the log, under the request's id.
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

from slr_core.errors import DeadlineError, RequestError, SLRError

from .observability.request_stats import current
from .protocol.native import ErrorDetail, ErrorResponse

CLIENT_CLOSED_REQUEST = 499
"""The status in logs and metrics of a request whose client left; nobody receives it."""

_INVALID, _SERVER = "invalid_request_error", "server_error"
_MOST_FAULTS, _LONGEST_NAME = 5, 100


class InvalidJSON(SLRError):
    """The body is not JSON."""


class UnsupportedMediaType(SLRError):
    """The body is declared as something other than JSON."""


class BodyTooLarge(SLRError):
    """The body is over the limit."""


class BodyTooSlow(SLRError):
    """The body did not arrive in time."""


class TooManyHeaders(SLRError):
    """The request's headers are over the limit."""


class Unauthorized(SLRError):
    """The request carries no key that opens this path."""


class Forbidden(SLRError):
    """Nobody may do this on this server."""


class NotFound(RequestError):
    """There is nothing of this name."""


class Conflict(SLRError):
    """It is not possible in the server's present state."""


class QueueFull(SLRError):
    """The engine has as much waiting work as it may.

    Attributes:
        retry_after_s: seconds until there should be room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(SLRError):
    """The engine is loading, stopped or stuck; another replica may answer."""


class TimedOut(SLRError):
    """The answer took too long."""


class ClientGone(SLRError):
    """The client closed the connection before its answer."""


_KINDS: dict[type[Exception], tuple[int, str, str]] = {
    RequestError: (400, _INVALID, "invalid_value"),
    InvalidJSON: (400, _INVALID, "invalid_json"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "forbidden"),
    NotFound: (404, _INVALID, "not_found"),
    BodyTooSlow: (408, "timeout_error", "body_timeout"),
    Conflict: (409, _INVALID, "conflict"),
    BodyTooLarge: (413, _INVALID, "body_too_large"),
    UnsupportedMediaType: (415, _INVALID, "unsupported_media_type"),
    TooManyHeaders: (431, _INVALID, "headers_too_large"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    ClientGone: (CLIENT_CLOSED_REQUEST, _INVALID, "client_closed_request"),
    Unavailable: (503, "unavailable_error", "unavailable"),
    TimedOut: (504, "timeout_error", "timeout"),
    DeadlineError: (504, "timeout_error", "timeout"),
}
"""Status, type and code of the errors whose message is for the caller. All others are a plain 500."""

_HTTP_ERRORS: dict[int, tuple[str, str]] = {
    404: ("not_found", "no such path"),
    405: ("method_not_allowed", "this path does not take that method"),
}

_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_MESSAGES = {"extra_forbidden": "unknown field", "missing": "required"}


@dataclass(frozen=True)
class Problem:
    """An error response before it is one."""

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
        """The response with the error body; its code is noted among the request's facts."""
        current().error = self.code
        return Response(
            self.body().model_dump_json(), self.status, headers=dict(self.headers), media_type="application/json"
        )


def describe(error: Exception) -> Problem:
    """The response that an exception deserves."""
    if isinstance(error, RequestValidationError):
        return _validation(error.errors())
    if isinstance(error, HTTPException):
        return _http(error)
    for kind in type(error).__mro__:
        if kind in _KINDS:
            status, family, code = _KINDS[kind]
            param = error.param if isinstance(error, RequestError) else None
            headers = {}
            if isinstance(error, QueueFull):
                headers["Retry-After"] = str(error.retry_after_s)
            elif isinstance(error, Unauthorized):
                headers["WWW-Authenticate"] = "Bearer"
            return Problem(status, family, code, str(error), param, headers)
    return Problem(500, _SERVER, "internal_error", "the server failed to answer this request")


def _http(error: HTTPException) -> Problem:
    code, message = _HTTP_ERRORS.get(error.status_code, ("http_error", str(error.detail)))
    family = _SERVER if error.status_code >= 500 else _INVALID
    return Problem(error.status_code, family, code, message, headers=error.headers or {})


def _validation(faults: Sequence[Mapping[str, Any]]) -> Problem:
    first = faults[0]
    if tuple(first["loc"]) == ("body",):
        return Problem(400, _INVALID, "invalid_value", "the body must be a JSON object")
    messages = [f"{_param(fault)}: {_message(fault)}" for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        messages.append(f"and {len(faults) - _MOST_FAULTS} more")
    code = _CODES.get(first["type"], "invalid_value")
    return Problem(400, _INVALID, code, "; ".join(messages), _param(first))


def _param(fault: Mapping[str, Any]) -> str:
    # loc starts with "body". A name may be one that the client made up, and as long as it likes.
    return ".".join(map(str, fault["loc"][1:]))[:_LONGEST_NAME]


def _message(fault: Mapping[str, Any]) -> str:
    message: str = _MESSAGES.get(fault["type"], fault["msg"])
    return message.replace("Input should be", "must be")


async def _handle(request: Request, error: Exception) -> Response:
    response = describe(error).response()
    if response.status_code == 405:
        # The router names the methods of one route, and a path may have several.
        response.headers["Allow"] = ", ".join(_methods(request)) or response.headers.get("Allow", "")
    return response


def _methods(request: Request) -> list[str]:
    app: FastAPI = request.app
    paths = app.openapi()["paths"]
    matching = (operations for path, operations in paths.items() if compile_path(path)[0].match(request.url.path))
    return sorted({method.upper() for operations in matching for method in operations})


def install(app: FastAPI) -> None:
    """Give every deliberate error of the application the error body.

    What nobody foresaw is answered in :class:`slr_server.middleware.RequestContext`, which alone sees all of it.
    """
    for kind in (SLRError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)
