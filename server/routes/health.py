"""Health checks and version. None of them waits for the engine."""

from __future__ import annotations

from fastapi import APIRouter

from slr_core._version import __version__

from ..errors import Unavailable
from ..protocol.operation import HealthStatus, Readiness, VersionInfo
from .common import ServiceDependency, document_errors

router = APIRouter(tags=["operation"])
_ERRORS = document_errors(503)


@router.get("/livez", summary="Liveness", responses=_ERRORS)
async def livez(service: ServiceDependency) -> HealthStatus:
    """503 if work is pending and the engine has finished no step for `--stall-timeout-s`: restart the process."""
    if service.stalled:
        raise Unavailable("the engine makes no progress")
    return HealthStatus(status="alive")


@router.get("/readyz", summary="Readiness", responses=_ERRORS)
async def readyz(service: ServiceDependency) -> Readiness:
    """503 while the model loads, while the server shuts down, and if the engine or the tokenizer makes no progress."""
    service.check()
    lags = round(service.tokenizers.lag_s, 6), round(service.loop_lag.seconds, 6)
    return Readiness(status="ready", tokenizer_lag_s=lags[0], event_loop_lag_s=lags[1])


@router.get("/health", summary="Health", responses=_ERRORS)
async def health(service: ServiceDependency) -> HealthStatus:
    """The same check as `/readyz`."""
    service.check()
    return HealthStatus(status="ready")


@router.get("/startupz", summary="Startup", responses=_ERRORS)
async def startupz(service: ServiceDependency) -> HealthStatus:
    """503 until the model has loaded and given a first answer."""
    if not service.started:
        raise Unavailable("the model is still loading" if service.failure is None else "the model could not be loaded")
    return HealthStatus(status="started")


@router.get("/version", summary="Version of the server", responses=document_errors(401))
async def version() -> VersionInfo:
    """The server's version."""
    return VersionInfo(version=__version__)
