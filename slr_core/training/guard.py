"""Stop a run that diverges, before it replaces its last good checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from slr_core.errors import TrainingError
from slr_core.training.config import TrainingGuardConfig

_REFERENCE_STEPS = 20


@dataclass
class _Watched:
    """A quantity that is watched.

    Attributes:
        factor: limit, as a multiple of the reference.
        reference: highest value of the first steps, or the floor that it began with.
        step: last step seen.
        seen: number of steps seen.
        above: consecutive steps above the limit, to the last one.
        before: the same without the last step.
    """

    factor: float
    reference: float
    step: int = -1
    seen: int = 0
    above: int = 0
    before: int = 0


class TrainingGuard:
    """Checks the loss and the gradient norm of every step.

    The reference has a floor. A model that writes its chain well has a loss near 0, which rises to that of a uniform
    guess where a curriculum then lets the loop take over: that is no divergence.

    Args:
        config: the limits.
        loss_floor: the least reference of the loss: that of a uniform guess in every objective, the logarithm of the
            vocabulary's size times the sum of their weights.
        gradient_floor: the least reference of the gradient norm: the norm to which gradients are clipped.
    """

    def __init__(self, config: TrainingGuardConfig, loss_floor: float, gradient_floor: float) -> None:
        self.config = config
        self._watched = {
            "loss": _Watched(config.loss_factor, loss_floor),
            "gradient": _Watched(config.gradient_factor, gradient_floor),
        }

    @property
    def is_stable(self) -> bool:
        """Whether the last loss and gradient were below their limits: only then is a checkpoint saved."""
        return not any(watched.above for watched in self._watched.values())

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, for a checkpoint: without it, a resumed run takes an explosion for its start."""
        return {name: asdict(watched) for name, watched in self._watched.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint; the limits stay those of the recipe.

        Raises:
            KeyError: a quantity is missing.
            TypeError: a field is unknown.
        """
        self._watched = {
            name: replace(watched, **{**state[name], "factor": watched.factor})
            for name, watched in self._watched.items()
        }

    def check_loss(self, value: float, step: int) -> None:
        """Check the loss of a step, or of one of its forward passes.

        Raises:
            TrainingError: it is not finite, or was above its limit for ``patience`` steps.
        """
        self._check("loss", value, step)

    def check_gradient(self, norm: float, step: int) -> None:
        """Check the norm of a step's gradient before clipping.

        Raises:
            TrainingError: as for the loss.
        """
        self._check("gradient", norm, step)

    def _check(self, what: str, value: float, step: int) -> None:
        if not isfinite(value):
            raise TrainingError(f"the {what} was not finite at step {step}")
        watched = self._watched[what]
        if step != watched.step:
            watched.step, watched.seen = step, watched.seen + 1
            watched.before, watched.above = watched.above, 0
        if watched.seen <= _REFERENCE_STEPS:
            watched.reference = max(watched.reference, value)
        elif value > watched.factor * watched.reference:
            watched.above = watched.before + 1
        if watched.above >= self.config.patience:
            raise TrainingError(
                f"the {what} has exploded: {value:.3g} at step {step}, above {watched.factor:g} times "
                f"{watched.reference:.3g} in {watched.above} consecutive steps"
            )
