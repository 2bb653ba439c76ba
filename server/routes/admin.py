"""``/admin/loop_sets``: which loop sets are served, changed while requests run. Needs the admin key."""

from __future__ import annotations

from fastapi import APIRouter

from ..protocol.native import LoadLoopSet, LoopSetList, LoopSetName
from .common import JSONRoute, ServiceDependency, errors

router = APIRouter(route_class=JSONRoute, prefix="/admin", tags=["operation"])
_REFUSED = (401, 403, 503)


@router.get("/loop_sets", summary="List the loop sets", responses=errors(*_REFUSED))
async def listed(service: ServiceDependency) -> LoopSetList:
    """Those that are loaded, and those that could be."""
    return await service.loop_sets()


@router.post(
    "/loop_sets",
    summary="Load a loop set",
    responses=errors(400, 404, 408, 409, 413, 415, 431, *_REFUSED),
)
async def load(body: LoadLoopSet, service: ServiceDependency) -> LoopSetList:
    """Load one of the operator's folder of loop sets. Requests that run are not disturbed."""
    await service.load_loop_set(body.name)
    return await service.loop_sets()


@router.delete("/loop_sets/{name}", summary="Remove a loop set", responses=errors(400, 404, 409, *_REFUSED))
async def remove(name: LoopSetName, service: ServiceDependency) -> LoopSetList:
    """Take no more requests for it. Those that run go on to their ends; then its memory is freed."""
    await service.remove_loop_set(name)
    return await service.loop_sets()
