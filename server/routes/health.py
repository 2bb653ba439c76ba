"""``GET /livez`` and ``GET /readyz``."""

from __future__ import annotations

from fastapi import APIRouter

from server.routes.common import ServiceDependency
from server.schemas import ErrorResponse, Health

router = APIRouter(tags=["operation"])


@router.get("/livez", summary="Whether the process answers")
async def livez() -> Health:
    """Always 200: it never asks the engine, so a long batch cannot get the process restarted."""
    return Health(status="alive")


@router.get(
    "/readyz",
    summary="Whether requests are taken",
    responses={503: {"model": ErrorResponse, "description": "The engine is loading, stopped or stuck."}},
)
async def readyz(service: ServiceDependency) -> Health:
    """503 while the model loads, when the engine is stopped, and when it has work but makes no progress."""
    service.check()
    return Health(status="ready")
