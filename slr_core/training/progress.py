"""What a training shows while it runs: the loss, a line from time to time; on a terminal, a progress bar too."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_NOT_TERMS = {
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "step",
    "state_norm",
    "last_relative_change",
    "tokens_per_second",
}


class ProgressReport(TrainerCallback):
    """Prints the loss and its terms to standard error; on a terminal also a bar.

    The last step is always logged, so that a short run shows its loss too.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._row = self._bar.add_task("training", total=None, loss="")
        self._began, self._first = time.perf_counter(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_about: Any
    ) -> None:
        """Start the clock and the bar."""
        self._began, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            self._bar.update(self._row, total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_about: Any) -> None:
        """Move the bar; have the last step logged."""
        self._bar.update(self._row, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_about: Any,
    ) -> None:
        """Print a line."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        self._bar.update(self._row, loss=f"loss {float(logs['loss']):.3f}")
        self.console.print(self._describe(state, logs), markup=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_about: Any
    ) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar; also where a training failed."""
        self._bar.stop()
        sys.stderr.flush()

    def _describe(self, state: TrainerState, logs: dict[str, Any]) -> str:
        seconds = time.perf_counter() - self._began
        rate = (state.global_step - self._first) / seconds
        left = (state.max_steps - state.global_step) / rate if rate else 0.0
        terms = [f"{name} {float(value):.3f}" for name, value in logs.items() if name not in _NOT_TERMS]
        joined = ", ".join(terms)
        change = logs.get("last_relative_change")
        return (
            f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}"
            f"{f' ({joined})' if len(terms) > 1 else ''}"
            f"{'' if change is None else f', relative change of the last iteration {float(change):.3f}'}; "
            f"{rate:.2f} steps/s, {float(logs['tokens_per_second']):.0f} tokens/s, {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
