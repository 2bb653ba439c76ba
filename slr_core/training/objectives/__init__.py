"""The training objectives: each is a function of a :class:`Rollout` that gives a loss term.

Symbols in all modules: T is the number of iterations of a batch, c the recipe's ``thoughts_per_step``, d the number of
iterations that a question needs, which is c times its steps. ``docs/training.md`` has a table of the objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from slr_core.errors import ConfigError
from slr_core.training.config import TrainConfig
from slr_core.training.objectives.answer import answer, start
from slr_core.training.objectives.chain import cot, cot_states
from slr_core.training.objectives.codi import codi
from slr_core.training.objectives.contraction import contraction
from slr_core.training.objectives.fixed_point import fixed_point
from slr_core.training.objectives.frontier import chains, frontier
from slr_core.training.objectives.halting import halting
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.shortcut import shortcut
from slr_core.training.objectives.steps import steps
from slr_core.training.objectives.teacher import teacher_logits, teacher_states
from slr_core.training.objectives.text import text
from slr_core.training.objectives.thoughts import thoughts
from slr_core.training.objectives.token_loss import Mean

__all__ = ["OBJECTIVES", "Mean", "Rollout", "check_defined", "losses"]

OBJECTIVES: Final[dict[str, tuple[Callable[[Rollout], Mean], int]]] = {
    "answer": (answer, 0),
    "start": (start, 1),  # without a loop, `answer` has the first token at h_0: it may be that of a written step
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
"""Every objective by its name in a recipe, with the fewest iterations for which it is defined."""


def check_defined(config: TrainConfig) -> None:
    """Check that every batch has a loss term.

    Raises:
        ConfigError: a stage has batches of so few iterations that none of its objectives is defined.
    """
    active = {name for name, weight in config.objectives if weight}
    for number, stage in enumerate(config.schedule):
        shortest = stage.shortest if config.max_iterations is None else min(stage.shortest, config.max_iterations)
        needs = {name: OBJECTIVES[name][1] for name in active - set(stage.without)}
        if min(needs.values()) > shortest:
            needed = ", ".join(f"{name} {least}" for name, least in sorted(needs.items()))
            raise ConfigError(
                f"stages.{number} has batches of {shortest} iterations, for which no objective is defined; at least: "
                f"{needed}"
            )


def losses(rollout: Rollout) -> dict[str, Mean]:
    """The unweighted loss terms whose weight is above 0."""
    weights = rollout.config.objectives
    return {
        name: objective(rollout)
        for name, (objective, min_iterations) in OBJECTIVES.items()
        if getattr(weights, name)
        and name not in rollout.plan.without
        and rollout.iterations >= min_iterations
        and not (name == "chains" and "chain_starts" not in rollout.batch)
    }
