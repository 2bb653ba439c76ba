"""``POST /grade``: the rules of the tasks, for answers that the page has collected."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from slr_core.errors import DataError, RequestError
from slr_core.tasks import TASKS
from slr_core.tasks.registry import recognize

from ..protocol.grade import GRADED_TASKS, GradeRequest, GradeResponse
from .common import JSONRoute, document_errors

router = APIRouter(
    route_class=JSONRoute, responses=document_errors(400, 401, 408, 413, 415, 431, 503), tags=["operation"]
)


@router.post("/grade", summary="Grade answers to questions of a task")
async def grade(request: Request, body: GradeRequest) -> GradeResponse:
    """Grade answers as `slr eval` does. The model does not run."""
    body.check()
    async with request.app.state.grading:
        return await asyncio.to_thread(_grade, body)


def _grade(body: GradeRequest) -> GradeResponse:
    examples = [question.to_example() for question in body.questions]
    task = TASKS[body.task] if body.task else recognize(examples, (TASKS[name] for name in GRADED_TASKS))
    task = task or TASKS["text"]
    try:
        correct = [task.grade(example, text) for example, text in zip(examples, body.texts, strict=True)]
    except DataError as error:
        raise RequestError(f"questions cannot be graded as {task.name}: {error}", param="questions") from error
    return GradeResponse(task=task.name, correct=correct)
