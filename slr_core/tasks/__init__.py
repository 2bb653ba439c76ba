"""Tasks: sources of questions, and the rules that grade their answers. Imports neither torch nor datasets nor sympy.

from slr_core.tasks import get_task
from slr_core.tasks.sources import load_questions

task = get_task("state_tracking")
questions = load_questions(task, generate=100, seed=0, generator_options={"length": 8})
"""

from slr_core.tasks.base import Example, Task
from slr_core.tasks.registry import TASKS, get_task, infer_task, resolve_task, task_names

__all__ = ["TASKS", "Example", "Task", "get_task", "infer_task", "resolve_task", "task_names"]
