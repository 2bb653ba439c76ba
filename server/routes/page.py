"""The page, and descriptions of the checkpoint: ``GET /checkpoint...`` and the files below ``/page``."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, get_args

from fastapi import APIRouter
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from slr_core.checkpoint.folder import local_path
from slr_core.checkpoint.validate import checkpoint_sha256, line, read_json
from slr_core.config import DEFAULT_THRESHOLDS, Criterion
from slr_core.errors import CheckpointError
from slr_core.generation.prepare import reads_chats
from slr_core.model.base_support import hidden_size

from ..protocol.grade import GRADED_TASKS
from ..protocol.operation import CheckpointFacts, CheckpointIdentity, CheckpointInfo, ExamplePrompt, RequestLimits
from ..service import Service
from .common import ServiceDependency, document_errors

_DIST = Path(__file__).parents[1] / "page" / "dist"
_EXAMPLES = "examples.json"
_MAX_EXAMPLES = 256
_EXAMPLE_LIST = TypeAdapter(Annotated[list[ExamplePrompt], Field(max_length=_MAX_EXAMPLES, fail_fast=True)])
CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content security policy of the page: nothing inline, nothing from another origin."""

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operation"], responses=document_errors(401, 503))


@router.get("/checkpoint", summary="Describe the served checkpoint")
async def checkpoint(service: ServiceDependency) -> CheckpointInfo:
    """The defaults of the served checkpoint's loop, the server's limits, and example prompts."""
    reasoner, settings = service.find_loop_set(None).reasoner, service.settings
    config, workspace = reasoner.config, reasoner.workspace
    loop = config.loop
    facts = await _read_facts(service)
    return CheckpointInfo(
        model=settings.model_name,
        models=service.model_names(),
        trained=config.trained,
        chat=facts.chat,
        workspace=loop.workspace,
        positions=workspace.width(0) or None,
        hidden_size=hidden_size(reasoner.base),
        trained_iterations=loop.trained_iterations,
        max_iterations=min(config.default_iterations, settings.max_iterations),
        criterion=loop.convergence.criterion,
        threshold=loop.convergence.effective_threshold,
        criteria={name: DEFAULT_THRESHOLDS[name] for name in get_args(Criterion) if loop.missing_for(name) is None},
        max_new_tokens=min(config.text.max_new_tokens, settings.max_new_tokens),
        limits=RequestLimits(
            max_iterations=settings.max_iterations,
            max_new_tokens=settings.max_new_tokens,
            max_top_tokens=settings.max_top_tokens,
            max_prompts=settings.max_prompts,
            max_state_values=settings.max_state_values,
        ),
        tasks=list(GRADED_TASKS),
        examples=facts.examples,
    )


@router.get("/checkpoint/identity", summary="Identify the served checkpoint")
async def identity(service: ServiceDependency) -> CheckpointIdentity:
    """What tells whether two servers answer alike: a hash of the checkpoint's files, and the precision of the weights.

    The hash is computed for the first client that asks, which takes seconds for a large model.
    """
    reasoner, settings = service.find_loop_set(None).reasoner, service.settings
    if service.checkpoint_sha256 is None:
        folder = local_path(settings.model)

        def compute() -> str | None:
            return checkpoint_sha256(folder) if folder.is_dir() else None

        service.checkpoint_sha256 = asyncio.create_task(asyncio.to_thread(compute))
    return CheckpointIdentity(
        sha256=await asyncio.shield(service.checkpoint_sha256),
        dtype=str(reasoner.base.dtype).removeprefix("torch."),
        quantization=settings.quantization,
    )


async def _read_facts(service: Service) -> CheckpointFacts:
    """Read once, however many clients ask: a large file or an expensive template takes seconds of a thread."""
    if service.checkpoint_facts is None:
        reasoner, model = service.find_loop_set(None).reasoner, service.settings.model

        def read() -> CheckpointFacts:
            return CheckpointFacts(reads_chats(reasoner), read_examples(local_path(model)))

        service.checkpoint_facts = asyncio.create_task(asyncio.to_thread(read))
    return await asyncio.shield(service.checkpoint_facts)


def read_examples(folder: Path) -> list[ExamplePrompt]:
    """The example prompts of a checkpoint folder; none if it has no ``examples.json`` or an unusable one."""
    file = folder / _EXAMPLES
    if not file.exists():
        return []
    try:
        examples = _EXAMPLE_LIST.validate_python(read_json(file))
        _EXAMPLE_LIST.dump_json(examples)  # a lone surrogate is valid in a file's JSON, and not in a response
    except (CheckpointError, ValidationError, PydanticSerializationError) as error:
        logger.warning("%s is not a list of examples: %s", file, line(error))
        return []
    return examples


def page_response() -> FileResponse:
    """The page."""
    return FileResponse(
        _DIST / "index.html",
        headers={"Content-Security-Policy": CSP, "Cache-Control": "no-cache", "Vary": "Accept"},
    )


def page_files() -> StaticFiles:
    """Serves the page's script and style."""
    return StaticFiles(directory=_DIST)
