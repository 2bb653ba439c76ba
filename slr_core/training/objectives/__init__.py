"""What a latent loop can be trained towards: one idea a file, each a pure function of a :class:`Rollout`.

With T the iterations of a batch, c the recipe's ``thoughts_per_step`` and d a question's own number of iterations: c
times its steps. ``docs/training.md`` has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from slr_core.training.objectives.answer import answer, start
from slr_core.training.objectives.chain import cot, cot_states
from slr_core.training.objectives.codi import codi
from slr_core.training.objectives.contraction import contraction
from slr_core.training.objectives.fixed_point import fixed_point
from slr_core.training.objectives.frontier import chains, frontier
from slr_core.training.objectives.halting import halting
from slr_core.training.objectives.rollout import Mean, Rollout
from slr_core.training.objectives.shortcut import shortcut
from slr_core.training.objectives.steps import steps
from slr_core.training.objectives.teacher import teacher_logits, teacher_states
from slr_core.training.objectives.text import text
from slr_core.training.objectives.thoughts import thoughts

__all__ = ["OBJECTIVES", "Mean", "Rollout", "losses"]

OBJECTIVES: Final[dict[str, tuple[Callable[[Rollout], Mean], int]]] = {
    "answer": (answer, 0),
    "start": (start, 0),
    "frontier": (frontier, 1),
    "chains": (chains, 1),
    "steps": (steps, 1),
    "thoughts": (thoughts, 1),
    "cot": (cot, 0),
    "cot_states": (cot_states, 1),
    "codi": (codi, 1),
    "teacher_states": (teacher_states, 1),
    "teacher_logits": (teacher_logits, 0),
    "text": (text, 0),
    "fixed_point": (fixed_point, 2),
    "contraction": (contraction, 2),
    "shortcut": (shortcut, 2),
    "halting": (halting, 1),
}
"""Every objective by its name in a recipe, and the iterations that a batch must have for it to mean anything."""


def losses(run: Rollout) -> dict[str, Mean]:
    """Every loss term that has a weight, unweighted."""
    weights = run.config.objectives
    terms = {
        name: objective(run)
        for name, (objective, least) in OBJECTIVES.items()
        if getattr(weights, name)
        and run.iterations >= least
        and not (name == "chains" and "chain_starts" not in run.batch)
    }
    if run.iterations == 0 and weights.answer and "start" not in terms:
        terms["start"] = start(run)
    return terms
