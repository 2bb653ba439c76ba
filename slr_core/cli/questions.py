"""Options that name a task and its questions, and the questions they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slr_core.errors import ConfigError
from slr_core.tasks import TASKS, resolve_task, task_names

if TYPE_CHECKING:
    from slr_core.tasks.base import Task


def _complete_task(incomplete: str) -> list[str]:
    return [name for name in task_names() if name.startswith(incomplete)]


def _complete_split(context: typer.Context, incomplete: str) -> list[str]:
    names = [split for task in _tasks_of(context) for split in task.hub]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _complete_generator_option(context: typer.Context, incomplete: str) -> list[str]:
    names = [f"{option}=" for task in _tasks_of(context) for option in task.generator_options]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _tasks_of(context: typer.Context) -> list[Task]:
    named = TASKS.get(context.params.get("task") or "")
    return list(TASKS.values()) if named is None else [named]


def _list_by_task(names: Callable[[Task], Iterable[str]]) -> str:
    listed = {task.name: ", ".join(names(task)) for task in TASKS.values()}
    return "; ".join(f"{task}: {values}" for task, values in listed.items() if values)


TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"Task, which grades the answers: {', '.join(TASKS)}, or module:object for one of your own. For any "
        "questions and answers: text, or text:contains, text:number, text:choice, text:regex=PATTERN to compare "
        "answers otherwise. Not needed if the file tells.",
        autocompletion=_complete_task,
    ),
]
Data = Annotated[Path | None, typer.Option(help="File of questions, .jsonl or .jsonl.gz.")]
Split = Annotated[
    str | None,
    typer.Option(
        help=f"Split of the task's public data set on the hub. {_list_by_task(lambda task: task.hub)}.",
        autocompletion=_complete_split,
    ),
]
Generate = Annotated[int | None, typer.Option(min=1, help="Generate this many questions.")]
GenerateSeed = Annotated[int, typer.Option(help="Seed of the generated questions.")]
GeneratorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--generator-option",
        help="Option of the question generator, as name=value; repeatable. "
        + _list_by_task(lambda task: task.generator_options)
        + ".",
        autocompletion=_complete_generator_option,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first questions, this many.")]


class QuestionSet:
    """A task and the questions that the options name.

    Raises:
        ConfigError: the options name no source of questions, or more than one.
        DataError: the questions cannot be read.
    """

    def __init__(
        self,
        task: str | None,
        data: Path | None,
        split: str | None,
        generate: int | None,
        seed: int,
        generator_options: list[str] | None,
        limit: int | None,
    ) -> None:
        from slr_core.tasks.sources import load_questions

        if sum(source is not None for source in (data, split, generate)) != 1:
            raise ConfigError("give exactly one of --data FILE, --split NAME and --generate N")
        self.task: Task = resolve_task(task, data)
        self.loaded = load_questions(
            self.task,
            data=data,
            split=split,
            generate=generate,
            seed=seed,
            generator_options=dict(_parse_generator_option(text) for text in generator_options or ()),
            limit=limit,
        )
        self.examples, self.source = self.loaded.examples, self.loaded.source

    @property
    def spec(self) -> dict[str, Any]:
        """The entries that identify the questions in a results file."""
        entries = {"task": self.task.name, "source": self.source, "questions": len(self.examples)}
        return {**entries, "questions_sha256": self.loaded.sha256}

    @property
    def title(self) -> str:
        """Task, source and number of questions, for the head of a table."""
        return f"{self.task.name}: {self.source}, {len(self.examples)} questions"

    def baselines(self) -> dict[str, float]:
        """The mean score of each shortcut rule that the task knows, on these questions."""
        scores = [self.task.baselines(example) for example in self.examples]
        return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def _parse_generator_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--generator-option {text}: expected name=value")
    return name, value
