"""What endpoints share: strict JSON bodies, the service, the documented errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from ..errors import InvalidJSON, UnsupportedMediaType
from ..protocol.native import ErrorResponse
from ..service import Service

_EXPLAINED = {
    400: "The body is not JSON, or a field is unknown, missing or wrong.",
    401: "A key is needed.",
    403: "Nobody may do this on this server.",
    404: "There is nothing of this name.",
    408: "The body did not arrive in time.",
    409: "The server's present state does not allow it.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    429: "Too much work is waiting.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The engine is loading, stopped or stuck, or the server is shutting down.",
    504: "The answer took too long.",
}
_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these errors."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _EXPLAINED[status]} for status in statuses
    }
    if 429 in described:
        described[429]["headers"] = _RETRY_AFTER
    return {**described, "default": {"model": ErrorResponse, "description": "Every error has this body."}}


ERRORS = errors(400, 401, 408, 413, 415, 429, 431, 500, 503, 504)
"""Of the endpoints that ask the model for something."""
STREAM: dict[str, Any] = {
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "description": "an event",
                "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
                "required": ["data"],
            }
        }
    }
}
"""The documentation of the other form of a successful answer."""


class _JSONRequest(Request):
    """A request whose body is parsed as JSON by the letter: no NaN, no lone surrogates, bounded depth."""

    _parsed: Any = None

    async def parse(self) -> None:
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaType("the content type must be application/json")
        try:
            self._parsed = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidJSON(f"the body is not valid JSON: {error}") from error

    async def json(self) -> Any:
        return self._parsed


class JSONRoute(APIRoute):
    """A route whose body, where it has one, is JSON and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the strict parser."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            parsed = _JSONRequest(request.scope, request.receive)
            # Before FastAPI asks for the JSON: it would blur the reason for which there is none.
            await parsed.parse()
            return await handle(parsed)

        return strict if self.body_field is not None else handle


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]
