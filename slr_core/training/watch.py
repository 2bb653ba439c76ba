"""A run that diverges is stopped while its last checkpoint is still good."""

from __future__ import annotations

from math import isfinite

from slr_core.errors import TrainingError
from slr_core.training.config import TrainingGuardConfig

_FIRST = 20


class Watch:
    """Sees the loss and the gradient norm of every step."""

    def __init__(self, guard: TrainingGuardConfig) -> None:
        self.guard = guard
        self._seen = {"loss": 0, "gradient": 0}
        self._highest = {"loss": 0.0, "gradient": 0.0}
        self._above = {"loss": 0, "gradient": 0}

    @property
    def calm(self) -> bool:
        """Whether nothing is running away: only then is a checkpoint worth keeping."""
        return not any(self._above.values())

    def loss(self, value: float, step: int) -> None:
        """Take in the loss of a step.

        Raises:
            TrainingError: it is not finite, or has exploded.
        """
        self._see("loss", value, self.guard.loss_factor, step)

    def gradient(self, norm: float, step: int) -> None:
        """Take in the norm of a step's gradient, before it is clipped.

        Raises:
            TrainingError: as for the loss.
        """
        self._see("gradient", norm, self.guard.gradient_factor, step)

    def _see(self, what: str, value: float, factor: float, step: int) -> None:
        if not isfinite(value):
            raise TrainingError(f"the {what} was not finite at step {step}")
        self._seen[what] += 1
        if self._seen[what] <= _FIRST:
            self._highest[what] = max(self._highest[what], value)
            return
        above = value > factor * self._highest[what]
        self._above[what] = self._above[what] + 1 if above else 0
        if self._above[what] >= self.guard.patience:
            raise TrainingError(
                f"the {what} has exploded: {value:.3g} at step {step}, and at most {self._highest[what]:.3g} in the "
                f"first {_FIRST} steps"
            )
