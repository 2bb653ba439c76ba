"""When a loop ends: the distances, the criterion with its patience, and the divergence guard.

Distances are taken in fp32. The rule that turns them into an exit decision is plain Python over
floats, one instance per request, so that it can be tested without a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from slr_core.config import GuardConfig
from slr_core.params import ResolvedLoopParams
from slr_core.types import ExitReason


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


def step(moved: Tensor, previous: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Length of a step and its share of |h_{t-1}|, each ``[B]`` fp32, by the Frobenius norm over own positions.

    Args:
        moved: what moved, ``[B, W, d]``: h_t, or g_t under a ``previous`` residual, whose small alpha must
            not look like convergence.
        previous: h_{t-1} ``[B, W, d]``.
        own: ``[B, W]`` bool, the positions that count; ``None``: all.
    """
    change = vector_norm(_flat(moved.float() - previous.float(), valid_mask), dim=-1)
    return change, change / vector_norm(_flat(previous.float(), valid_mask), dim=-1)


def measure(
    hidden: Tensor,
    valid_mask: Tensor | None,
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
    norm = vector_norm(_flat(hidden.float(), valid_mask), dim=-1)
    entropy = None if head is None else _entropy(head)
    if previous is None:
        return Distances(norm, entropy=entropy)
    moved = hidden if moved is None else moved
    change, relative_change = step(moved, previous, valid_mask)
    flat, flat_before = _flat(moved.float(), valid_mask), _flat(previous.float(), valid_mask)
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


def _flat(x: Tensor, valid_mask: Tensor | None) -> Tensor:
    return (x if valid_mask is None else x.masked_fill(~valid_mask[..., None], 0)).flatten(-2)


def _entropy(log_probabilities: Tensor) -> Tensor:
    entropy: Tensor = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)
    return entropy


class ExitRule:
    """The exit decision of one request, fed once per iteration in order.

    Args:
        settings: the request's loop settings.
        guard: when expanding counts as diverging.
    """

    def __init__(self, settings: ResolvedLoopParams, guard: GuardConfig) -> None:
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
