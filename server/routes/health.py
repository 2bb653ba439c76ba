"""``GET /livez``, ``GET /readyz`` and ``GET /startupz``: none of them asks the engine for anything."""

from __future__ import annotations

from fastapi import APIRouter

from ..errors import Unavailable
from ..protocol.native import Health
from .common import ServiceDependency, errors

router = APIRouter(tags=["operation"], responses=errors(503))


@router.get("/livez", summary="Whether the process should live on")
async def livez(service: ServiceDependency) -> Health:
    """503 when work is pending and the engine has made no step for as long as the operator allows: nothing but a
    restart helps. A long queue or a long batch is no reason."""
    if service.stalled:
        raise Unavailable("the engine makes no progress")
    return Health(status="alive")


@router.get("/readyz", summary="Whether requests are taken")
async def readyz(service: ServiceDependency) -> Health:
    """503 while the model loads, while the server shuts down, and when the engine is stopped or stuck."""
    service.check()
    return Health(status="ready")


@router.get("/startupz", summary="Whether the model has been loaded")
async def startupz(service: ServiceDependency) -> Health:
    """503 until the model has been loaded and has given a first answer."""
    if not service.started:
        raise Unavailable("the model is still loading" if service.failure is None else "the model could not be loaded")
    return Health(status="started")
