"""``POST /generate`` and ``POST /trace``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response

from slr_core.engine import FinishedEvent, IterationEvent, TokenEvent

from ..preprocess import check_limits, count, plan
from ..protocol.native import (
    GenerateRequest,
    GenerateResponse,
    GenerateResult,
    Head,
    IterationData,
    TokenData,
    TraceRequest,
    TraceResponse,
    TraceResult,
)
from ..service import GenerationJob, Service
from ..sse import EventStream, frame, while_connected
from .common import ERRORS, STREAM, JSONRoute, ServiceDependency

router = APIRouter(route_class=JSONRoute, responses={200: STREAM, **ERRORS}, tags=["reasoning"])


@router.post("/generate", summary="Answer prompts after a latent loop", response_model=GenerateResponse)
async def generate(body: GenerateRequest, request: Request, service: ServiceDependency) -> GenerateResponse | Response:
    """Refine the hidden state until it settles, then write the answer.

    Several prompts are answered independently and batched together. `max_iterations: 0` asks the base model.
    With `stream`, events named `iteration`, `token` and `result` tell of each answer by its `index`, and `done`
    ends the stream; an event `error` in its place says why it broke off.
    """
    ask, head = _ask(body, service), _head(service)
    if body.stream:
        return await _stream(request, service, ask, head, GenerateResult)
    results = await while_connected(request.receive, service.answer(ask))
    return GenerateResponse(
        results=[GenerateResult.of(index, *answer) for index, answer in enumerate(results)], **vars(head)
    )


@router.post("/trace", summary="Answer prompts and show every iteration", response_model=TraceResponse)
async def trace(body: TraceRequest, request: Request, service: ServiceDependency) -> TraceResponse | Response:
    """The same answers as `/generate`, with each iteration's diagnostics and what the head reads from its state."""
    ask, head = _ask(body, service), _head(service)
    if body.stream:
        return await _stream(request, service, ask, head, TraceResult)
    results = await while_connected(request.receive, service.answer(ask))
    return TraceResponse(results=[TraceResult.of(index, *answer) for index, answer in enumerate(results)], **vars(head))


def _ask(body: GenerateRequest, service: Service) -> GenerationJob:
    check_limits(body, service.settings)
    return GenerationJob(count(body), partial(plan, body, service.settings), body.loop_set, bool(body.stream))


def _head(service: Service) -> Head:
    return Head(id=f"slr-{uuid.uuid4().hex}", model=service.settings.model_name, created=int(time.time()))


async def _stream(
    request: Request, service: Service, ask: GenerationJob, head: Head, shown: type[GenerateResult]
) -> EventStream:
    return await EventStream.begin(
        request.receive,
        _frames(service, ask, head, shown),
        write_timeout_s=service.settings.write_timeout_s,
        error_event="error",
    )


async def _frames(
    service: Service, ask: GenerationJob, head: Head, shown: type[GenerateResult]
) -> AsyncGenerator[bytes]:
    async with aclosing(service.stream(ask)) as outputs:
        async for index, event, reduced in outputs:
            match event:
                case IterationEvent(record):
                    yield frame(IterationData.of(record, index=index), "iteration")
                case TokenEvent(token_id, text):
                    yield frame(TokenData(index=index, token_id=token_id, text=text), "token")
                case FinishedEvent(result):
                    yield frame(shown.of(index, result, reduced), "result")
    yield frame(head, "done")
