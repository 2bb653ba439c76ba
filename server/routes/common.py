"""What endpoints share: strict JSON bodies, the service, the documented errors, waiting for a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import Receive

from server.errors import ClientGone, InvalidJSON, UnsupportedMediaType
from server.schemas import ErrorResponse
from server.service import Service

T = TypeVar("T")

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON, or a field is unknown, missing or wrong."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The content type is not application/json."},
    429: {
        "model": ErrorResponse,
        "description": "Too much work is waiting.",
        "headers": {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}},
    },
    500: {"model": ErrorResponse, "description": "The server failed."},
    503: {"model": ErrorResponse, "description": "The engine is loading, stopped or stuck."},
    504: {"model": ErrorResponse, "description": "The answer took too long."},
    "default": {"model": ErrorResponse, "description": "Every error has this body."},
}


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
    """A route that takes JSON and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the strict parser."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            parsed = _JSONRequest(request.scope, request.receive)
            # Before FastAPI asks for the JSON: it would blur the reason for which there is none.
            await parsed.parse()
            return await handle(parsed)

        return strict


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; when the client leaves first, cancel it.

    Raises:
        ClientGone: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
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
