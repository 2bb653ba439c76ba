"""What a model is asked, and how its answers are graded. Importing this stays light: no torch, no datasets, no sympy.

from slr_core.tasks import get
from slr_core.tasks.sources import load

task = get("state_tracking")
questions = load(task, generate=100, seed=0, dials={"length": 8})
"""

from __future__ import annotations

from importlib.util import find_spec

from slr_core._install import missing_extra
from slr_core.errors import ConfigError
from slr_core.tasks.arithmetic import Arithmetic
from slr_core.tasks.base import Task
from slr_core.tasks.competition import CompetitionMath
from slr_core.tasks.prontoqa import ProntoQA
from slr_core.tasks.prosqa import ProsQA
from slr_core.tasks.reachability import Reachability
from slr_core.tasks.state_tracking import StateTracking
from slr_core.tasks.word_problems import GSM8K, SVAMP, ASDiv, GSMHard, MultiArith

__all__ = ["TASKS", "get"]

_ALL: tuple[Task, ...] = (
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
    StateTracking(),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get(name: str) -> Task:
    """The task of that name, ready to grade.

    Raises:
        ConfigError: there is none, or it needs packages that are not installed.
    """
    task = TASKS.get(name)
    if task is None:
        raise ConfigError(f"there is no task {name}; there are {', '.join(TASKS)}")
    missing = [module for module in task.needs if find_spec(module) is None]
    if missing:
        raise missing_extra(f"the task {name}", "eval", f"no module {missing[0]}")
    return task
