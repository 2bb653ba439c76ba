"""``GET /metrics``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from .common import ServiceDependency, document_errors

router = APIRouter(tags=["operation"], responses=document_errors(401))


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, service: ServiceDependency) -> Response:
    """All metrics, in the text format that the scraper accepts."""
    content, content_type = await service.exposition.render(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})
