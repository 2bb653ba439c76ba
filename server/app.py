"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware

from slr_core._install import missing_extra
from slr_core._version import __version__
from slr_core.engine import Engine

from .auth import ApiKeys, Auth
from .errors import install_handlers
from .hosts import HostCheck, allowed_hosts
from .middleware import (
    REQUEST_ID,
    SERVER_TIMING,
    HeadAsGet,
    HeaderLimit,
    IgnoreRange,
    Preflight,
    RequestContext,
)
from .overload import BodyLimit, EarlyRefusal, LimitsByPath, RequestCount
from .routes import admin, generate, grade, health, index, metrics, openai, page
from .service import Service
from .settings import ServerSettings, split_list

_DESCRIPTION = """
An inference server for language models that reason in hidden states: a latent loop refines a hidden state until it
converges, and only then are tokens generated. Every answer reports its iterations and why its loop ended.
"""


def create_app(settings: ServerSettings, engine: Engine | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: the server's settings.
        engine: a running engine, which the caller closes. ``None``: the application loads ``settings.model`` at
            startup and closes the engine at shutdown.

    Raises:
        ConfigError: spans are enabled and OpenTelemetry is not installed, the folder of loop adapter sets does not
            exist, or the file of keys cannot be used.
    """
    service = Service(settings, engine)
    api_keys = ApiKeys(settings.api_keys, settings.api_keys_file)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title="Stable Latent Reasoning",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, service, api_keys),
    )
    app.state.service, app.state.api_keys = service, api_keys
    install_handlers(app)
    # For the documentation only: slr_server.auth checks the keys.
    bearer = [Depends(HTTPBearer(auto_error=False, description="a key of the server"))]
    for module in (generate, openai, metrics, page, grade):
        app.include_router(module.router, dependencies=bearer if api_keys else None)
    app.include_router(health.router)
    app.include_router(index.router)
    app.mount("/static", index.static_files())
    app.mount("/page", page.page_files())
    app.include_router(admin.router, dependencies=bearer)
    return app


def _middleware(settings: ServerSettings, service: Service, api_keys: ApiKeys) -> list[Middleware]:
    """Middleware, the outermost first."""
    layers = [
        *_tracing(settings),
        Middleware(RequestContext, metrics=service.metrics, is_draining=lambda: service.draining is not None),
    ]
    layers += [Middleware(HeadAsGet), Middleware(IgnoreRange), Middleware(HeaderLimit)]
    layers.append(Middleware(HostCheck, allowed=allowed_hosts(settings)))
    if settings.cors_origins is not None:
        layers.append(
            Middleware(
                Preflight,
                allow_origins=split_list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                # Client libraries send headers of their own, such as x-stainless-*. No cookies are used, so no
                # header of a configured origin gives it more rights.
                allow_headers=["*"],
                expose_headers=[REQUEST_ID, SERVER_TIMING, "Retry-After"],
            )
        )
    layers.append(Middleware(Auth, api_keys=api_keys, admin_key=settings.admin_key))
    limits = LimitsByPath(service.requests)
    layers.append(Middleware(EarlyRefusal, limits=limits))
    layers.append(Middleware(BodyLimit, limit=settings.max_body_bytes, timeout_s=settings.body_timeout_s))
    layers.append(Middleware(RequestCount, limits=limits))
    return layers


def _tracing(settings: ServerSettings) -> list[Middleware]:
    if settings.otel_endpoint is None:
        return []
    try:
        from .observability.tracing import Tracing, exporting_provider
    except ImportError as error:
        raise missing_extra("otel_endpoint", "otel", error) from error
    return [Middleware(Tracing, provider=exporting_provider(settings.otel_endpoint))]
