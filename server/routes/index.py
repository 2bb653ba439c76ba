"""``GET /``, ``GET /docs`` and the files of the documentation page: all of it is served from the package."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from slr_core._version import __version__

from ..auth import accepts_html
from ..protocol.operation import EndpointInfo, Index
from .common import ServiceDependency, document_errors
from .page import page_response

_STATIC = Path(__file__).parents[1] / "static"
_CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content security policy of the documentation page: nothing comes from another origin."""

router = APIRouter(tags=["operation"])


@router.get("/", summary="List the endpoints", response_model=Index, responses=document_errors(401))
async def index(request: Request, service: ServiceDependency) -> Index | Response:
    """What this server is, and its endpoints. Browsers, which accept `text/html`, get the page."""
    if accepts_html(request.headers):
        return page_response()
    app: FastAPI = request.app
    return Index(
        name=app.title,
        version=__version__,
        model=service.settings.model_name,
        docs="/docs",
        endpoints=[
            EndpointInfo(method=method.upper(), path=path, summary=operation["summary"])
            for path, operations in app.openapi()["paths"].items()
            for method, operation in operations.items()
        ],
    )


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """The documentation as a page (Swagger UI)."""
    return FileResponse(_STATIC / "docs.html", headers={"Content-Security-Policy": _CSP})


def static_files() -> StaticFiles:
    """Serves the files of the documentation page."""
    return StaticFiles(directory=_STATIC)
