"""``POST /generate`` and ``POST /trace``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from ..protocol.native import (
    GenerateFormatter,
    GenerateRequest,
    GenerateResponse,
    TraceFormatter,
    TraceRequest,
    TraceResponse,
    to_job,
)
from .common import GENERATION_ERRORS, STREAM, JSONRoute, ServiceDependency, respond

router = APIRouter(route_class=JSONRoute, responses={200: STREAM, **GENERATION_ERRORS}, tags=["reasoning"])


@router.post("/generate", summary="Answer prompts after a latent loop", response_model=GenerateResponse)
async def generate(body: GenerateRequest, request: Request, service: ServiceDependency) -> BaseModel | Response:
    """Refine the hidden state until it converges, then generate the answer.

    Several prompts are answered independently and batched together. `max_iterations: 0` runs the base model without a
    loop. With `stream`, the events `iteration`, `token` and `result` each carry the `index` of their answer, and `done`
    ends the stream; if it fails, the event `error` ends it instead.
    """
    return await respond(request, service, to_job(body), lambda name, _: GenerateFormatter(name))


@router.post("/trace", summary="Answer prompts and return every iteration", response_model=TraceResponse)
async def trace(body: TraceRequest, request: Request, service: ServiceDependency) -> BaseModel | Response:
    """As `/generate`, with each iteration's measures and the tokens that the LM head reads from its state."""
    return await respond(request, service, to_job(body), lambda name, _: TraceFormatter(name))
