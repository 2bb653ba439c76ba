"""Tasks by name: the built-in ones, installed ones (entry points), and those of a module named on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from slr_core._install import missing_extra
from slr_core.errors import ConfigError
from slr_core.suggest import did_you_mean
from slr_core.tasks.arithmetic import Arithmetic
from slr_core.tasks.base import Example, Task, read_jsonl
from slr_core.tasks.competition import CompetitionMath
from slr_core.tasks.generated_word_problems import GeneratedWordProblems
from slr_core.tasks.modular_arithmetic import ModularArithmetic
from slr_core.tasks.p_hop import PHop
from slr_core.tasks.prontoqa import ProntoQA
from slr_core.tasks.prosqa import ProsQA
from slr_core.tasks.reachability import Reachability
from slr_core.tasks.state_tracking import StateTracking
from slr_core.tasks.text import GRADINGS, TextTask
from slr_core.tasks.word_problems import GSM8K, SVAMP, ASDiv, GSMHard, MultiArith

ENTRY_POINTS = "slr.tasks"
"""The entry point group in which an installed package names its tasks."""

_BUILT_IN: tuple[Task, ...] = (
    TextTask(),
    ProsQA(),
    ProntoQA(),
    GSM8K(),
    GSMHard(),
    SVAMP(),
    MultiArith(),
    ASDiv(),
    CompetitionMath(),
    Reachability(),
    Arithmetic(),
    ModularArithmetic(),
    StateTracking(),
    PHop(),
    GeneratedWordProblems(),
)
TASKS: dict[str, Task] = {task.name: task for task in _BUILT_IN}
"""The built-in tasks by name. An entry point cannot replace one."""


def task_names() -> list[str]:
    """The names that :func:`get_task` knows: built-in tasks first, then those of entry points."""
    return [*TASKS, *(name for name in _installed() if name not in TASKS)]


def get_task(name: str) -> Task:
    """The task of that name, ready to grade.

    Args:
        name: a built-in task; ``text:GRADING``; an entry point of the group ``slr.tasks``; or ``module:object``, where
            the object is a :class:`~slr_core.tasks.base.Task` or a subclass that takes no arguments. A module may lie
            in the working directory.

    Raises:
        ConfigError: there is none, it is not a task, or it needs packages that are not installed.
    """
    task = _find(name)
    missing = [module for module in task.needs if find_spec(module) is None]
    if missing:
        raise missing_extra(f"the task {name}", "eval", f"{missing[0]} is missing")
    return task


def infer_task(path: str | Path) -> Task:
    """The task to which all questions of a file belong, read from their fields.

    Args:
        path: a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        ConfigError: the questions do not tell; the message lists the tasks.
        DataError: the file cannot be read.
    """
    examples = read_jsonl(path)
    task = recognize(examples, _all_tasks())
    if task is not None:
        return task
    raise ConfigError(
        f"{path}: the questions do not tell their task; name it: text (any questions and answers; also "
        f"text:{', text:'.join(GRADINGS[1:])}), {', '.join(name for name in task_names() if name != 'text')}"
    )


def recognize(examples: Sequence[Example], tasks: Iterable[Task]) -> Task | None:
    """The first task to which all examples belong by their fields; ``None``: no task."""
    return next((task for task in tasks if examples and all(map(task.recognizes, examples))), None)


def resolve_task(name: str | None, file: str | Path | None) -> Task:
    """The task named, or else the one inferred from the file of questions.

    Raises:
        ConfigError: there is no such task, or none is named and the file does not tell (or there is no file).
        DataError: the file cannot be read.
    """
    if name is not None:
        return get_task(name)
    if file is None:
        raise ConfigError(f"name the task (--task; in a recipe: task): {', '.join(task_names())}")
    return infer_task(file)


def _find(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    first, colon, rest = name.partition(":")
    if first == TextTask.name and colon:
        return TextTask(rest)
    if (installed := _installed().get(name)) is not None:
        return _load_entry_point(installed)
    if not colon:
        raise ConfigError(
            f"there is no task {name}; there are {', '.join(task_names())}, and module:object for one of your own"
            f"{did_you_mean(name, task_names())}"
        )
    # A console script does not look into the working directory by itself.
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(first), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the task {name} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    return _instance(found, name)


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _load_entry_point(entry: EntryPoint) -> Task:
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the task {entry.name} ({entry.value}) cannot be loaded: {error}") from error
    return _instance(found, entry.value)


def _instance(found: object, name: str) -> Task:
    if isinstance(found, type) and issubclass(found, Task):
        return found()
    if not isinstance(found, Task):
        raise ConfigError(f"{name} is not a task: expected a slr_core.tasks.base.Task, got {type(found).__name__}")
    return found


def _all_tasks() -> Iterator[Task]:
    yield from TASKS.values()
    yield from (_load_entry_point(entry) for name, entry in _installed().items() if name not in TASKS)
