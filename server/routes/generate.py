"""``POST /generate`` and ``POST /trace``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request

from server.routes.common import ERRORS, JSONRoute, ServiceDependency, while_connected
from server.schemas import (
    GenerateRequest,
    GenerateResponse,
    GenerateResult,
    TraceRequest,
    TraceResponse,
    TraceResult,
)
from server.service import Service

router = APIRouter(route_class=JSONRoute, responses=ERRORS, tags=["reasoning"])


@router.post("/generate", summary="Answer prompts after a latent loop")
async def generate(body: GenerateRequest, request: Request, service: ServiceDependency) -> GenerateResponse:
    """Refine the hidden state until it settles, then write the answer.

    Several prompts are answered independently and batched together. `max_iterations: 0` asks the base model.
    """
    results = await while_connected(request, service.answer(body))
    return GenerateResponse(
        results=[GenerateResult.of(index, result) for index, result in enumerate(results)], **_head(service)
    )


@router.post("/trace", summary="Answer prompts and show every iteration")
async def trace(body: TraceRequest, request: Request, service: ServiceDependency) -> TraceResponse:
    """The same answers as `/generate`, with each iteration's diagnostics and what the head reads from its state."""
    results = await while_connected(request, service.answer(body))
    return TraceResponse(
        results=[TraceResult.of(index, result) for index, result in enumerate(results)], **_head(service)
    )


def _head(service: Service) -> dict[str, Any]:
    return {"id": f"slr-{uuid.uuid4().hex}", "model": service.settings.model_name, "created": int(time.time())}
