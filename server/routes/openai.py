"""``POST /v1/completions``, ``POST /v1/chat/completions`` and ``GET /v1/models``: OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from slr_core.engine.adapter_set import LoopAdapterSet

from ..protocol import chat as chat_protocol
from ..protocol import completions as completions_protocol
from ..protocol.chat import ChatCompletion, ChatFormatter, ChatRequest
from ..protocol.completions import Completion, CompletionFormatter, CompletionRequest
from ..protocol.openai import Model, ModelList
from ..protocol.vocabulary import Vocabulary
from ..service import Service
from .common import GENERATION_ERRORS, STREAM, JSONRoute, ServiceDependency, document_errors, respond

router = APIRouter(route_class=JSONRoute, prefix="/v1", tags=["openai"])
_RESPONSES: dict[int | str, dict[str, Any]] = {200: STREAM, **document_errors(404), **GENERATION_ERRORS}


@router.post("/completions", summary="Complete prompts", response_model=Completion, responses=_RESPONSES)
async def completions(body: CompletionRequest, request: Request, service: ServiceDependency) -> BaseModel | Response:
    """OpenAI's completions. Prompts are texts or token ids, used as they are.

    With `echo` and `logprobs`, the base model scores the prompt's tokens. `slr.loop_at: k` runs the loop after the
    prompt's first `k` tokens instead of after all of them: the rest is then scored as the loop's answer.
    """
    job = completions_protocol.to_job(body)
    service.check_model(body.model)

    def formatter(name: str, loop_set: LoopAdapterSet) -> CompletionFormatter:
        return CompletionFormatter(body, name, Vocabulary(loop_set.reasoner.tokenizer))

    return await respond(request, service, job, formatter)


@router.post("/chat/completions", summary="Answer a chat", response_model=ChatCompletion, responses=_RESPONSES)
async def chat(body: ChatRequest, request: Request, service: ServiceDependency) -> BaseModel | Response:
    """OpenAI's chat completions, for checkpoints with a chat template."""
    job = chat_protocol.to_job(body)
    service.check_model(body.model)

    def formatter(name: str, loop_set: LoopAdapterSet) -> ChatFormatter:
        return ChatFormatter(body, name, Vocabulary(loop_set.reasoner.tokenizer))

    return await respond(request, service, job, formatter)


@router.get("/models", summary="List the models", responses=document_errors(401, 503))
async def models(service: ServiceDependency) -> ModelList:
    """The served model, and the loop adapter sets loaded on its base: requests can name each as `model`."""
    return ModelList(data=[_model(name, service) for name in service.model_names()])


@router.get("/models/{model:path}", summary="Get a model", responses=document_errors(401, 404, 503))
async def model(model: str, service: ServiceDependency) -> Model:
    """One of the models that `GET /v1/models` lists."""
    service.check_model(model)
    return _model(model, service)


def _model(name: str, service: Service) -> Model:
    return Model(id=name, created=service.created)
