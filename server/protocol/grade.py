"""``/grade``: bodies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints

from slr_core.errors import RequestError
from slr_core.tasks import TASKS
from slr_core.tasks.base import Example

from .schema import RequestModel, ResponseModel

_MAX_QUESTIONS = 64
Text = Annotated[str, StringConstraints(max_length=20_000)]
GRADED_TASKS = tuple(name for name, task in TASKS.items() if not task.needs)
"""Tasks whose answers can be graded in the server's process."""


class GradedQuestion(RequestModel):
    """A question with its answer, as a line of a data file; further fields tell the task."""

    model_config = ConfigDict(extra="allow")

    question: Text
    steps: list[Text] = Field([], max_length=256)
    answer: Text

    def to_example(self) -> Example:
        """The line as a task reads it."""
        extra: dict[str, Any] = self.model_extra or {}
        return Example(self.question, tuple(self.steps), self.answer, extra)


class GradeRequest(RequestModel):
    """Body of ``POST /grade``."""

    questions: list[GradedQuestion] = Field(min_length=1, max_length=_MAX_QUESTIONS, fail_fast=True)
    texts: list[Text] = Field(max_length=_MAX_QUESTIONS, description="what the model wrote to each of them")
    task: str | None = Field(
        None, description="task whose rule grades the answers; default: the one that the fields tell, else `text`"
    )

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            RequestError: there is no such task, or not one text per question.
        """
        if len(self.texts) != len(self.questions):
            raise RequestError(
                f"texts must hold one text per question, {len(self.questions)}, got {len(self.texts)}", param="texts"
            )
        if self.task is not None and self.task not in GRADED_TASKS:
            raise RequestError(f"task must be one of {', '.join(GRADED_TASKS)}", param="task")


class GradeResponse(ResponseModel):
    """Which answers are right."""

    task: str = Field(description="the task whose rule graded them")
    correct: list[bool]
