"""When a loop ends: the distances, the criterion with its patience, and the divergence guard.

Distances are taken in fp32. The rule that turns them into an exit decision is plain Python over
floats, one instance per request, so that it can be tested without a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.linalg import vector_norm

from slr_core.config import DEFAULT_THRESHOLDS, Criterion, GuardConfig, LoopConfig
from slr_core.errors import RequestError

ExitReason = Literal["converged", "max_iterations", "diverged", "cancelled"]


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


@dataclass(frozen=True)
class Distances:
    """Per-row measures of one iteration, each ``[B]`` fp32, ``None`` where undefined or not asked for.

    ``norm`` is the length of the new state and ``change`` that of the step. What compares two states is
    undefined where h_{t-1} is an input and not a state; the head's measures need logits, ``learned`` a
    halting head.
    """

    norm: Tensor
    change: Tensor | None = None
    relative_change: Tensor | None = None
    cosine: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    entropy_change: Tensor | None = None
    argmax_stable: Tensor | None = None
    learned: Tensor | None = None


def step(moved: Tensor, previous: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Length of a step and its share of |h_{t-1}|, each ``[B]`` fp32, by the Frobenius norm over own positions.

    Args:
        moved: what moved, ``[B, W, d]``: h_t, or g_t under a ``previous`` residual, whose small alpha must
            not look like convergence.
        previous: h_{t-1} ``[B, W, d]``.
        own: ``[B, W]`` bool, the positions that count; ``None``: all.
    """
    change = vector_norm(_flat(moved.float() - previous.float(), own), dim=-1)
    return change, change / vector_norm(_flat(previous.float(), own), dim=-1)


def measure(
    hidden: Tensor,
    own: Tensor | None,
    *,
    previous: Tensor | None = None,
    moved: Tensor | None = None,
    head: Tensor | None = None,
    head_before: Tensor | None = None,
    p_halt: Tensor | None = None,
) -> Distances:
    """What one iteration says about its loop.

    Args:
        hidden: h_t ``[B, W, d]``.
        own: ``[B, W]`` bool, the positions that count; ``None``: all.
        previous: h_{t-1}, where it is a state; without it nothing that compares states is defined.
        moved: see :func:`step`; by default h_t.
        head: the head's log-probabilities ``[B, V]`` fp32 at h_t, where needed.
        head_before: the same at h_{t-1}.
        p_halt: ``[B]``, the halting head's, where there is one.
    """
    norm = vector_norm(_flat(hidden.float(), own), dim=-1)
    entropy = None if head is None else _entropy(head)
    if previous is None:
        return Distances(norm, entropy=entropy)
    moved = hidden if moved is None else moved
    change, relative_change = step(moved, previous, own)
    flat, flat_before = _flat(moved.float(), own), _flat(previous.float(), own)
    distances = Distances(
        norm,
        change=change,
        relative_change=relative_change,
        cosine=1 - torch.nn.functional.cosine_similarity(flat, flat_before, dim=-1),
        entropy=entropy,
        learned=None if p_halt is None else 1 - p_halt,
    )
    if head is None or entropy is None or head_before is None:
        return distances
    return replace(
        distances,
        kl=torch.linalg.vecdot(head_before.exp(), head_before - head),
        entropy_change=(entropy - _entropy(head_before)).abs(),
        argmax_stable=(head.argmax(-1) != head_before.argmax(-1)).float(),
    )


def _flat(x: Tensor, own: Tensor | None) -> Tensor:
    return (x if own is None else x.masked_fill(~own[..., None], 0)).flatten(-2)


def _entropy(log_probabilities: Tensor) -> Tensor:
    entropy: Tensor = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)
    return entropy


class ExitRule:
    """The exit decision of one request, fed once per iteration in order.

    Args:
        settings: the request's loop settings.
        guard: when expanding counts as diverging.
    """

    def __init__(self, settings: LoopSettings, guard: GuardConfig) -> None:
        self.settings, self.guard = settings, guard
        self.settled = 0
        self.expanding = 0
        self.first_norm = math.nan
        self.last_change: float | None = None
        self.contraction: float | None = None

    def update(
        self, t: int, *, distance: float | None, change: float | None, norm: float, finite: bool = True
    ) -> ExitReason | None:
        """Take in iteration ``t`` (from 1) and say whether, and why, the loop ends with it.

        Args:
            t: the iteration just run.
            distance: the criterion's value; ``None`` where it is undefined, which never counts as settled.
            change: norm of the step; ``None`` where there is no earlier state.
            norm: norm of the new state.
            finite: whether the new state is finite throughout.
        """
        self.contraction = change / self.last_change if change is not None and self.last_change else None
        self.last_change = change
        if t == 1:
            self.first_norm = norm
        self.expanding = self.expanding + 1 if self.contraction is not None and self.contraction > 1 else 0
        far = norm > self.guard.norm_factor * self.first_norm
        if not finite or (self.expanding >= self.guard.expanding_iterations and far):
            return "diverged"

        below = distance is not None and distance < self.settings.threshold
        self.settled = self.settled + 1 if below and self.settings.criterion != "fixed" else 0
        if t >= self.settings.min_iterations and self.settled >= self.settings.patience:
            return "converged"
        return "max_iterations" if t >= self.settings.max_iterations else None

    def last_good(self, t: int, finite: bool) -> int:
        """The iteration whose state is decoded after a divergence at ``t``: the last one before the trouble."""
        return t - 1 if not finite else max(0, t - self.expanding)
