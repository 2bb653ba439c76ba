"""What a request may set: how tokens are sampled, and how long its loop runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Self

import torch

from slr_core.config import DEFAULT_THRESHOLDS, Criterion, LoopConfig
from slr_core.errors import RequestError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep the whole vocabulary.

    Raises:
        RequestError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, accepted in (
            ("temperature", 0 <= self.temperature < inf, "a number from 0"),
            ("top_k", self.top_k >= 0, "a whole number from 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "a whole number from 0 to 2**64 - 1"),
        ):
            if not fine:
                raise RequestError(f"{name} must be {accepted}, got {getattr(self, name)}", param=name)

    def generator(self) -> torch.Generator | None:
        """The request's own source of randomness: its draws do not depend on its batch."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class LoopSettings:
    """What one request asks of its loop, every default filled in."""

    max_iterations: int
    min_iterations: int
    criterion: Criterion
    threshold: float
    patience: int

    @classmethod
    def resolve(
        cls,
        loop: LoopConfig,
        *,
        max_iterations: int | None = None,
        min_iterations: int | None = None,
        criterion: Criterion | None = None,
        threshold: float | None = None,
        patience: int | None = None,
    ) -> Self:
        """Fill in the checkpoint's defaults.

        A criterion given without a threshold takes that criterion's default threshold. A default
        minimum gives way to an explicit maximum, and a default maximum to an explicit minimum.

        Raises:
            RequestError: a value is out of range, ``min_iterations`` is above an explicit ``max_iterations``,
                or the loop would pass the last trained iteration under the policy ``error``.
        """
        for name, value, least in (
            ("max_iterations", max_iterations, 0),
            ("min_iterations", min_iterations, 0),
            ("patience", patience, 1),
            ("threshold", threshold, 0),
        ):
            if value is not None and not value >= least:  # so written, NaN is refused too
                raise RequestError(f"{name} must be at least {least}, got {value}", param=name)
        if criterion is not None and criterion not in DEFAULT_THRESHOLDS:
            raise RequestError(
                f"criterion must be one of {', '.join(DEFAULT_THRESHOLDS)}, got {criterion}", param="criterion"
            )
        if criterion == "learned" and not loop.halting_head:
            raise RequestError("criterion learned needs a checkpoint with a halting head", param="criterion")
        if max_iterations is not None and min_iterations is not None and min_iterations > max_iterations:
            raise RequestError(
                f"min_iterations must be at most max_iterations ({max_iterations}), got {min_iterations}",
                param="min_iterations",
            )
        highest = max(loop.max_iterations, min_iterations or 0) if max_iterations is None else max_iterations
        lowest = min(loop.min_iterations, highest) if min_iterations is None else min_iterations
        if loop.lora.past_end == "error" and highest > loop.trained_iterations:
            raise RequestError(
                f"max_iterations must be at most {loop.trained_iterations}, the last trained iteration, got {highest}",
                param="max_iterations",
            )
        default = loop.convergence
        if threshold is None:
            threshold = (
                default.effective_threshold
                if criterion in (None, default.criterion)
                else DEFAULT_THRESHOLDS[criterion or default.criterion]
            )
        return cls(highest, lowest, criterion or default.criterion, threshold, patience or default.patience)

    @property
    def reads_head(self) -> bool:
        """Whether the criterion needs the LM head at every iteration."""
        return self.criterion in ("kl", "entropy_change", "argmax_stable")
