"""Callbacks of the Trainer, except the progress report."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from slr_core.training.config import TrainConfig


class ResetOptimizer(TrainerCallback):
    """Clears the moments of AdamW at the start of stages with ``reset_optimizer``, as in Coconut's code."""

    def __init__(self, config: TrainConfig) -> None:
        starts, step = set(), 0
        for stage in config.schedule:
            if stage.reset_optimizer:
                starts.add(step)
            step += stage.steps
        self.starts = starts

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the moments if a stage starts."""
        if state.global_step in self.starts:
            kwargs["optimizer"].state.clear()


class RecipeIntervals(TrainerCallback):
    """Saves and logs as often as the recipe says; a checkpoint has the intervals of the run that wrote it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace the intervals of the checkpoint."""
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
