"""``POST /grade``: the rules of the tasks, for answers that the page has collected."""

from __future__ import annotations

from functools import partial
from threading import Event

from fastapi import APIRouter, Request

from slr_core.errors import DataError, RequestError
from slr_core.tasks import TASKS
from slr_core.tasks.registry import recognize

from ..observability.request_stats import request_stats
from ..overload import GRADE
from ..protocol.grade import GRADED_TASKS, GradeRequest, GradeResponse
from ..request_group import until_deadline
from ..sse import while_connected
from .common import JSONRoute, ServiceDependency, document_errors

router = APIRouter(
    route_class=JSONRoute, responses=document_errors(400, 401, 408, 413, 415, 429, 431, 503, 504), tags=["operation"]
)


@router.post(GRADE, summary="Grade answers to questions of a task")
async def grade(request: Request, body: GradeRequest, service: ServiceDependency) -> GradeResponse:
    """Grade answers as `slr eval` does. The model does not run."""
    service.check_not_draining()
    body.check()
    given_up = Event()
    try:
        async with until_deadline(service.deadline(request_stats(request.scope)), service.settings.request_timeout_s):
            return await while_connected(request.receive, service.grader.run(partial(_grade, body, given_up)))
    finally:
        given_up.set()


def _grade(body: GradeRequest, given_up: Event) -> GradeResponse:
    examples = [question.to_example() for question in body.questions]
    task = TASKS[body.task] if body.task else recognize(examples, (TASKS[name] for name in GRADED_TASKS))
    task = task or TASKS["text"]
    try:
        correct = [
            task.grade(example, text)
            for example, text in zip(examples, body.texts, strict=True)
            if not given_up.is_set()  # then nobody reads the response
        ]
    except DataError as error:
        raise RequestError(f"questions cannot be graded as {task.name}: {error}", param="questions") from error
    return GradeResponse(task=task.name, correct=correct)
