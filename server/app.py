"""The application: settings in, ASGI out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from slr_core._install import missing_extra
from slr_core._version import __version__
from slr_core.engine import Engine

from . import errors
from .auth import Auth
from .middleware import REQUEST_ID, SERVER_TIMING, BodyLimit, HeaderLimit, RequestContext
from .observability.access_log import AccessLogEntry
from .routes import admin, generate, health, metrics, openai
from .service import Service
from .settings import Settings, split

_DESCRIPTION = """
An inference server for language models that think in their hidden states: a latent loop refines a state until it
settles, and only then are tokens written. Every answer says how many iterations it took and why the loop ended.
"""


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: the server's settings.
        engine: a running engine, which stays its owner's to close; by default the application loads
            ``settings.model`` at startup and closes it at shutdown.

    Raises:
        ConfigError: spans are asked for and OpenTelemetry is not installed.
    """
    service = Service(settings, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title="Stable Latent Reasoning",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, service),
    )
    app.state.service = service
    errors.install(app)
    bearer = [Depends(HTTPBearer(auto_error=False, description="a key of the server"))]  # for the docs: see Auth
    for module in (generate, openai, metrics):
        app.include_router(module.router, dependencies=bearer if settings.api_keys else None)
    app.include_router(health.router)
    app.include_router(admin.router, dependencies=bearer)
    return app


def _middleware(settings: Settings, service: Service) -> list[Middleware]:
    """From the outside in."""
    layers = [
        Middleware(RequestContext, metrics=service.metrics, trace=_tracer(settings)),
        Middleware(HeaderLimit),
    ]
    if settings.cors_origins is not None:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=split(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", REQUEST_ID],
                expose_headers=[REQUEST_ID, SERVER_TIMING, "Retry-After"],
            )
        )
    layers.append(Middleware(Auth, api_keys=settings.api_keys, admin_key=settings.admin_key))
    layers.append(Middleware(BodyLimit, limit=settings.max_body_bytes))
    return layers


def _tracer(settings: Settings) -> Callable[[AccessLogEntry], None] | None:
    if settings.otel_endpoint is None:
        return None
    try:
        from .observability.tracing import tracer
    except ImportError as error:
        raise missing_extra("otel_endpoint", "otel", error) from error
    return tracer(settings.otel_endpoint, settings.model_name)
