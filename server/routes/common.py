"""What endpoints share: strict JSON bodies, the service, documented errors, and the path of a generation request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json

from slr_core.engine import FinishedEvent
from slr_core.engine.adapter_set import LoopAdapterSet

from ..errors import InvalidJSON, UnsupportedMediaType
from ..observability.request_stats import RequestStats, request_stats
from ..preprocess import GenerationJob, check_limits
from ..protocol.schema import Answer, ErrorResponse, Formatter, OutputEvent
from ..request_group import until_deadline
from ..service import Service
from ..sse import EventStream, while_connected

_DESCRIPTIONS = {
    400: "The body is not JSON, or a field is unknown, missing or invalid.",
    401: "A valid key is required.",
    403: "The operation is disabled on this server.",
    404: "The named object does not exist.",
    408: "The body did not arrive in time.",
    409: "The operation conflicts with the server's current state.",
    413: "The body is too large.",
    415: "The content type is not application/json, or the body is compressed.",
    429: "The queue is full.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The engine is loading, stopped or stalled, or the server is shutting down.",
    504: "The request exceeded its time limit.",
}
_SMALL_RESPONSE = 256
"""Values of a response that is encoded on the event loop."""
_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}


def document_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI documentation of these error responses."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _DESCRIPTIONS[status]} for status in statuses
    }
    if 429 in responses:
        responses[429]["headers"] = _RETRY_AFTER
    return {**responses, "default": {"model": ErrorResponse, "description": "Every error has this body."}}


GENERATION_ERRORS = document_errors(400, 401, 408, 413, 415, 429, 431, 500, 503, 504)
"""Documentation of the errors of endpoints that run the model."""
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
"""Documentation of a streamed response."""


# -- bodies ------------------------------------------------------------------------------------------------


class _JSONRequest(Request):
    """A request whose body is parsed as strict JSON: no NaN, no lone surrogates, bounded depth."""

    _parsed: Any = None

    async def parse(self) -> None:
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMediaType("the content type must be application/json")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("the body must not be compressed: this server accepts no Content-Encoding")
        try:
            self._parsed = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidJSON(f"the body is not valid JSON: {error}") from error

    async def json(self) -> Any:
        return self._parsed


class JSONRoute(APIRoute):
    """A route that accepts only JSON bodies, strictly parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the strict parser."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            parsed = _JSONRequest(request.scope, request.receive)
            # Parsed before FastAPI does it: its error message would not say what is wrong.
            await parsed.parse()
            return await handle(parsed)

        return strict if self.body_field is not None else handle


async def _service(request: Request) -> Service:  # async: else it would run in a thread
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]


# -- generation --------------------------------------------------------------------------------------------


async def respond(
    request: Request,
    service: Service,
    job: GenerationJob,
    formatter_for: Callable[[str, LoopAdapterSet], Formatter],
) -> BaseModel | Response:
    """Run a job and format its answers, whole or as a stream: the path of every generation request.

    Args:
        request: the HTTP request.
        service: runs the job.
        job: the body, translated.
        formatter_for: makes the endpoint's formatter from the name of the loop adapter set and the set.

    Raises:
        RequestError: as :func:`slr_server.preprocess.check_limits` and :meth:`Service.find_loop_set`.
        SLRError: as :meth:`Service.answer`.
        ClientGone: the client disconnected.
    """
    check_limits(job, service.settings)
    with job.names.in_errors():
        loop_set = service.find_loop_set(job.loop_set)
    formatter, stats = formatter_for(service.name_of(loop_set), loop_set), request_stats(request.scope)
    if job.stream:
        return await EventStream.start(
            request.receive,
            _frames(service, job, loop_set, stats, formatter),
            write_timeout_s=service.settings.write_timeout_s,
            error_event=formatter.error_event,
        )
    answers = await while_connected(request.receive, service.answer(job, loop_set, stats))
    encode = partial(_encode, formatter, answers)
    async with until_deadline(service.deadline(stats), service.settings.request_timeout_s):
        content = await service.encoder.run(encode) if _is_large(job, answers) else encode()
    # As a response, because FastAPI would validate and encode a model on the event loop.
    return Response(content, media_type="application/json")


def _encode(formatter: Formatter, answers: Sequence[Answer]) -> bytes:
    return formatter.body(answers).model_dump_json().encode()


def _is_large(job: GenerationJob, answers: Sequence[Answer]) -> bool:
    """Whether encoding the answers takes more than a few milliseconds."""
    values = len(answers)
    if job.trace:
        values += sum(
            (len(result.records) + sum(map(len, result.records_per_token))) * (1 + request.top_tokens)
            for request, result, _ in answers
        )
    if job.logprobs is not None:
        scored = sum(len(result.scores) + len(result.prompt_scores) for _, result, _ in answers)
        values += scored * (1 + job.logprobs)
    return job.include_states or values > _SMALL_RESPONSE


async def _encode_event(
    service: Service, job: GenerationJob, formatter: Formatter, output: OutputEvent
) -> Iterable[bytes]:
    """The frames of an event; those of a large result are encoded in a thread."""
    event = output.event
    if isinstance(event, FinishedEvent) and _is_large(job, [Answer(output.request, event.result, False)]):
        return await service.encoder.run(lambda: list(formatter.frames(output)))
    return formatter.frames(output)


async def _frames(
    service: Service, job: GenerationJob, loop_set: LoopAdapterSet, stats: RequestStats, formatter: Formatter
) -> AsyncGenerator[bytes]:
    async with aclosing(service.stream(job, loop_set, stats)) as outputs:
        async for output in outputs:
            for frame in await _encode_event(service, job, formatter, output):
                yield frame
            if job.trace:  # large events: let other requests run in between
                await asyncio.sleep(0)
    for frame in formatter.final_frames():
        yield frame
