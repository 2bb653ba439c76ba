"""``/admin/loop_sets``: change the served loop adapter sets while requests run. Requires the admin key."""

from __future__ import annotations

from fastapi import APIRouter

from ..protocol.operation import LoadLoopSet, LoopSetList, LoopSetName
from ..service import Service
from .common import JSONRoute, ServiceDependency, document_errors

router = APIRouter(route_class=JSONRoute, prefix="/admin", tags=["operation"])
_ERRORS = (401, 403, 503)


@router.get("/loop_sets", summary="List the loop adapter sets", responses=document_errors(*_ERRORS))
async def list_loop_sets(service: ServiceDependency) -> LoopSetList:
    """The loaded sets, and those that can be loaded."""
    return await _list(service)


@router.post(
    "/loop_sets",
    summary="Load a loop adapter set",
    responses=document_errors(400, 404, 408, 409, 413, 415, 431, 504, *_ERRORS),
)
async def load_loop_set(body: LoadLoopSet, service: ServiceDependency) -> LoopSetList:
    """Load a checkpoint from the operator's folder. Running requests go on."""
    await service.load_loop_set(body.name)
    return await _list(service)


@router.delete(
    "/loop_sets/{name}", summary="Remove a loop adapter set", responses=document_errors(400, 404, 409, *_ERRORS)
)
async def remove_loop_set(name: LoopSetName, service: ServiceDependency) -> LoopSetList:
    """Accept no more requests for a set. Its running requests finish; then its memory is freed."""
    await service.remove_loop_set(name)
    return await _list(service)


async def _list(service: Service) -> LoopSetList:
    return LoopSetList(loaded=service.model_names(), available=await service.available_loop_sets())
