"""``GET /metrics``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
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
    try:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
    except (TypeError, ValueError):  # a version that is not a number
        encode, content_type = choose_encoder("")
    return Response(encode(service.metrics.registry), headers={"Content-Type": content_type})
