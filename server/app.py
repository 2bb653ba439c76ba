"""The application: settings in, ASGI out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from server import errors
from server.middleware import BodyLimit, RequestContext
from server.routes import generate, health, metrics
from server.service import Service
from server.settings import Settings
from slr_core._version import __version__
from slr_core.engine import Engine

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
        middleware=[
            Middleware(RequestContext, metrics=service.metrics),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
    )
    app.state.service = service
    errors.install(app)
    for module in (generate, health, metrics):
        app.include_router(module.router)
    return app
