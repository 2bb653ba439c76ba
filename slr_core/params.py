"""Parameters of a request: how tokens are sampled, and how long its loop runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING

from slr_core.config import DEFAULT_THRESHOLDS, Criterion, SLRConfig
from slr_core.errors import RequestError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: sample from this many of the most likely tokens; 0: from all.
        top_p: sample from the smallest set of the most likely tokens with this probability mass, in (0, 1].
        seed: sampling seed; ``None``: different for every request.

    Raises:
        RequestError: a value is out of range, or not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_types(self, whole=("top_k", "seed"), numbers=("temperature", "top_p"))
        for name, valid, accepted in (
            ("temperature", 0 <= self.temperature < inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
        ):
            if not valid:
                raise RequestError(f"{name} must be {accepted}, got {getattr(self, name)}", param=name)

    def generator(self) -> torch.Generator | None:
        """A generator for one request, so that its samples do not depend on its batch; ``None`` if greedy."""
        if self.temperature == 0:
            return None
        import torch  # here, so that a client that only sets parameters starts without it

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class LoopParams:
    """How long a loop runs. A field that is ``None`` takes the checkpoint's default.

    Args:
        max_iterations: maximum number of iterations; 0: the base model without a loop.
        min_iterations: number of iterations before the loop may stop by itself.
        criterion: the convergence criterion, a key of :data:`slr_core.config.DEFAULT_THRESHOLDS`.
        threshold: the loop converges when the criterion falls below it; at least 0.
        patience: number of iterations in a row below the threshold; at least 1.
        noise_scale: standard deviation of Gaussian noise in h_0, as a multiple of the RMS of each of its positions.
        noise_seed: seed of that noise.

    Raises:
        RequestError: a value is out of range or of another type, or ``min_iterations`` is above ``max_iterations``.
    """

    max_iterations: int | None = None
    min_iterations: int | None = None
    criterion: Criterion | None = None
    threshold: float | None = None
    patience: int | None = None
    noise_scale: float = 0.0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        _check_types(
            self,
            whole=("max_iterations", "min_iterations", "patience", "noise_seed"),
            numbers=("threshold", "noise_scale"),
        )
        least_values = {"max_iterations": 0, "min_iterations": 0, "patience": 1, "threshold": 0, "noise_scale": 0}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # not `value < least`: NaN is refused too
                raise RequestError(f"{name} must be at least {least}, got {value}", param=name)
        for name, valid in (
            ("threshold", self.threshold is None or self.threshold < inf),
            ("noise_scale", self.noise_scale < inf),
            ("noise_seed", 0 <= self.noise_seed < 2**64),
        ):
            if not valid:
                raise RequestError(f"{name} is out of range, got {getattr(self, name)}", param=name)
        if self.criterion is not None and self.criterion not in tuple(DEFAULT_THRESHOLDS):  # it may be unhashable
            raise RequestError(
                f"criterion must be one of {', '.join(DEFAULT_THRESHOLDS)}, got {self.criterion}", param="criterion"
            )
        if None not in (self.max_iterations, self.min_iterations) and self.min_iterations > self.max_iterations:  # type: ignore[operator]
            raise RequestError(
                f"min_iterations must be at most max_iterations ({self.max_iterations}), got {self.min_iterations}",
                param="min_iterations",
            )

    def resolve(self, config: SLRConfig) -> ResolvedLoopParams:
        """Fill in the checkpoint's defaults.

        A criterion without a threshold takes that criterion's default threshold. A default minimum is lowered to an
        explicit maximum, and a default maximum is raised to an explicit minimum. An untrained loop runs only if a
        parameter is set.

        Raises:
            RequestError: the criterion needs a halting head or an end token that the checkpoint does not have, the
                workspace takes no noise, or the loop would pass the last trained iteration under the policy ``error``.
        """
        loop = config.loop
        if self.criterion is not None and (needed := loop.missing_for(self.criterion)):
            raise RequestError(
                f"criterion {self.criterion} needs a checkpoint whose loop config has {needed}", param="criterion"
            )
        if self.noise_scale and loop.workspace == "token":
            raise RequestError("the workspace token has no initial state that noise could disturb", param="noise_scale")
        most, least = self.max_iterations, self.min_iterations
        most_by_default = config.default_iterations if self == LoopParams() else loop.max_iterations
        highest = max(most_by_default, least or 0) if most is None else most
        lowest = min(loop.min_iterations, highest) if least is None else least
        if loop.lora.past_end == "error" and highest > loop.trained_iterations:
            raise RequestError(
                f"max_iterations must be at most {loop.trained_iterations}, the last trained iteration, got {highest}",
                param="max_iterations",
            )
        default = loop.convergence
        criterion = self.criterion or default.criterion
        threshold = self.threshold
        if threshold is None:
            threshold = default.effective_threshold if criterion == default.criterion else DEFAULT_THRESHOLDS[criterion]
        patience = self.patience or default.patience
        return ResolvedLoopParams(highest, lowest, criterion, threshold, patience, self.noise_scale, self.noise_seed)


def _check_types(params: SamplingParams | LoopParams, whole: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    for names, kind, accepted in ((whole, Integral, "a whole number"), (numbers, Real, "a number")):
        for name in names:
            value = getattr(params, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise RequestError(f"{name} must be {accepted}, got {value}", param=name)


@dataclass(frozen=True)
class ResolvedLoopParams:
    """:class:`LoopParams` with every field set."""

    max_iterations: int
    min_iterations: int
    criterion: Criterion
    threshold: float
    patience: int
    noise_scale: float = 0.0
    noise_seed: int = 0

    @property
    def reads_head(self) -> bool:
        """Whether the criterion needs the LM head's logits at every iteration."""
        return self.criterion in ("kl", "entropy_change", "argmax_stable", "end_token")
