"""``POST /v1/completions``, ``POST /v1/chat/completions``, ``GET /v1/models``: what OpenAI's clients ask for."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from slr_core.engine import Event, FinishedEvent, IterationEvent
from slr_core.types import Result

from ..errors import NotFound
from ..protocol.chat import Chat
from ..protocol.completions import Completions
from ..protocol.openai import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    StreamOptions,
    Usage,
)
from ..service import GenerationJob, Service
from ..sse import COMMENT, EventStream, frame, while_connected
from .common import ERRORS, STREAM, JSONRoute, ServiceDependency, errors

router = APIRouter(route_class=JSONRoute, prefix="/v1", tags=["openai"])
_ANSWERS: dict[int | str, dict[str, Any]] = {200: STREAM, **errors(404), **ERRORS}


@router.post("/completions", summary="Complete prompts", response_model=Completion, responses=_ANSWERS)
async def completions(body: CompletionRequest, request: Request, service: ServiceDependency) -> Completion | Response:
    """OpenAI's completions. Prompts are raw: texts, or token ids.

    With `echo` and `logprobs` the prompt's tokens are scored by the un-looped base model. `slr.loop_at: k` runs the
    loop after the prompt's first `k` tokens instead of after all of them: those that follow are then scored as the
    answer that the loop leads to.
    """
    whole = Completions(body, service.settings)
    loop_set = service.loop_set_of(body.model)
    head = _head("cmpl", loop_set, service)
    if body.stream:
        made = partial(Completion, **head)
        frames = _frames(service, whole.ask(loop_set), whole.parts().of, made, whole.usage, body.stream_options)
        return await _stream(request, service, frames)
    results = await while_connected(request.receive, service.answer(whole.ask(loop_set)))
    choices = await service.in_thread(partial(whole.choices, results))
    return Completion(**head, choices=choices, usage=whole.usage([result for result, _ in results]))


@router.post("/chat/completions", summary="Answer a chat", response_model=ChatCompletion, responses=_ANSWERS)
async def chat(body: ChatRequest, request: Request, service: ServiceDependency) -> ChatCompletion | Response:
    """OpenAI's chat completions, for checkpoints that have a chat template."""
    whole = Chat(body, service.settings)
    loop_set = service.loop_set_of(body.model)
    head = _head("chatcmpl", loop_set, service)
    if body.stream:
        made = partial(ChatChunk, **head)
        frames = _frames(service, whole.ask(loop_set), whole.parts, made, whole.usage, body.stream_options)
        return await _stream(request, service, frames)
    results = await while_connected(request.receive, service.answer(whole.ask(loop_set)))
    choices = await service.in_thread(partial(whole.choices, results))
    return ChatCompletion(**head, choices=choices, usage=whole.usage([result for result, _ in results]))


@router.get("/models", summary="List the models", responses=errors(401, 503))
async def models(service: ServiceDependency) -> ModelList:
    """The served checkpoint, and the loop sets that were loaded on its base: each can be named as `model`."""
    return ModelList(data=[_model(name, service) for name in service.models()])


@router.get("/models/{model}", summary="Show a model", responses=errors(401, 404, 503))
async def model(model: str, service: ServiceDependency) -> Model:
    """One of them."""
    if model not in service.models():
        raise NotFound(f"there is no model {model!r}; GET /v1/models lists them", param="model")
    return _model(model, service)


def _model(name: str, service: Service) -> Model:
    return Model(id=name, created=service.created)


def _head(kind: str, loop_set: str | None, service: Service) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": loop_set or service.settings.model_name,
    }


async def _stream(request: Request, service: Service, frames: AsyncGenerator[bytes]) -> EventStream:
    return await EventStream.begin(request.receive, frames, write_timeout_s=service.settings.write_timeout_s)


async def _frames(
    service: Service,
    ask: GenerationJob,
    parts: Callable[[int, Event, bool], Iterable[BaseModel]],
    made: Callable[..., BaseModel],
    usage: Callable[[list[Result]], Usage],
    options: StreamOptions | None,
) -> AsyncGenerator[bytes]:
    results: list[Result] = []
    async with aclosing(service.stream(ask)) as outputs:
        async for index, event, reduced in outputs:
            if isinstance(event, IterationEvent):
                yield COMMENT  # the headers go out, and whoever waits sees that something happens
            for part in parts(index, event, reduced):
                yield frame(made(choices=[part]))
            if isinstance(event, FinishedEvent):
                results.append(event.result)
    if options is not None and options.include_usage:
        yield frame(made(choices=[], usage=usage(results)))
    yield frame("[DONE]")
