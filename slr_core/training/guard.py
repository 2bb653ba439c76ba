"""Stop a run that diverges, before it replaces its last good checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from slr_core.errors import TrainingError
from slr_core.training.config import TrainingGuardConfig

_REFERENCE_STEPS = 20


class TrainingGuard:
    """Checks the loss and the gradient norm of every step.

    Args:
        config: the limits.
        starts: first step of each stage. The loss of another stage is another quantity: where the loop takes over
            steps that a model has learnt to write, it rises from nearly 0 to the logarithm of the vocabulary.
    """

    def __init__(self, config: TrainingGuardConfig, starts: Sequence[int] = (0,)) -> None:
        self.config = config
        self._starts = starts
        self._seen = {"loss": 0, "gradient": 0}
        self._highest = {"loss": 0.0, "gradient": 0.0}
        self._above = {"loss": 0, "gradient": 0}

    @property
    def is_stable(self) -> bool:
        """Whether the last loss and gradient were below their limits: only then is a checkpoint saved."""
        return not any(self._above.values())

    def check_loss(self, value: float, step: int) -> None:
        """Check the loss of a step.

        Raises:
            TrainingError: it is not finite, or was above its limit for ``patience`` steps.
        """
        self._check("loss", value, self.config.loss_factor, step)

    def check_gradient(self, norm: float, step: int) -> None:
        """Check the norm of a step's gradient before clipping.

        Raises:
            TrainingError: as for the loss.
        """
        self._check("gradient", norm, self.config.gradient_factor, step)

    def _check(self, what: str, value: float, factor: float, step: int) -> None:
        if not isfinite(value):
            raise TrainingError(f"the {what} was not finite at step {step}")
        self._seen[what] += 1
        begins = any(0 <= step - start < _REFERENCE_STEPS for start in self._starts)
        if begins or self._seen[what] <= _REFERENCE_STEPS:  # a resumed run begins anywhere
            self._highest[what] = max(self._highest[what], value)
            self._above[what] = 0
            return
        above = value > factor * self._highest[what]
        self._above[what] = self._above[what] + 1 if above else 0
        if self._above[what] >= self.config.patience:
            raise TrainingError(
                f"the {what} has exploded: {value:.3g} at step {step}, and at most {self._highest[what]:.3g} in the "
                f"first {_REFERENCE_STEPS} steps of its stages"
            )
