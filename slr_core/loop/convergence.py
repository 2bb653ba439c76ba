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
    """Per-row measures of one iteration, each ``[B]`` fp32, ``None`` where undefined or not computed.

    ``norm`` is the norm of the new state and ``change`` that of the step. Measures that compare two states are
    undefined where h_{t-1} is an input and not a state; ``kl``, ``entropy``, ``entropy_change``, ``argmax_stable`` and
    ``end_token`` need the LM head's logits, ``learned`` and ``survival`` a halting head. ``end_token`` and ``survival``
    compare no states: they are defined at every iteration.
    """

    norm: Tensor
    change: Tensor | None = None
    relative_change: Tensor | None = None
    cosine: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    entropy_change: Tensor | None = None
    argmax_stable: Tensor | None = None
    end_token: Tensor | None = None
    learned: Tensor | None = None
    survival: Tensor | None = None


def measure_step(compared: Tensor, previous: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Norm of a step, absolute and relative to |h_{t-1}|, each ``[B]`` fp32: Frobenius norms over valid positions.

    Args:
        compared: the state compared with h_{t-1}, ``[B, W, d]``: h_t, or g_t under a ``previous`` residual, so that
            a small alpha does not look like convergence.
        previous: h_{t-1} ``[B, W, d]``.
        valid_mask: ``[B, W]`` bool, the positions that count; ``None``: all.
    """
    change = vector_norm(_flat(compared.float() - previous.float(), valid_mask), dim=-1)
    return change, change / vector_norm(_flat(previous.float(), valid_mask), dim=-1)


def measure(
    hidden: Tensor,
    valid_mask: Tensor | None,
    *,
    previous: Tensor | None = None,
    compared: Tensor | None = None,
    head: Tensor | None = None,
    head_before: Tensor | None = None,
    p_halt: Tensor | None = None,
    survival_before: Tensor | None = None,
    end_token_id: int | None = None,
) -> Distances:
    """Compute the measures of one iteration.

    Args:
        hidden: h_t ``[B, W, d]``.
        valid_mask: ``[B, W]`` bool, the positions that count; ``None``: all.
        previous: h_{t-1} ``[B, W, d]`` if it is a state; ``None``: measures that compare states are undefined.
        compared: see :func:`measure_step`; ``None``: h_t.
        head: the LM head's log-probabilities ``[B, V]`` fp32 at h_t; ``None``: no measures of the head.
        head_before: the same at h_{t-1}.
        p_halt: ``[B]`` of the halting head; ``None``: there is none.
        survival_before: ``[B]`` fp32, ``survival`` at h_{t-1}; ``None``: this is the first iteration.
        end_token_id: the token of ``end_token``; ``None``: it is not measured.
    """
    norm = vector_norm(_flat(hidden.float(), valid_mask), dim=-1)
    entropy = None if head is None else _entropy(head)
    survival = None if p_halt is None else 1 - p_halt
    if survival is not None and survival_before is not None:
        survival = survival_before * survival
    end_token = None if head is None or end_token_id is None else 1 - head[:, end_token_id].exp()
    if previous is None:
        return Distances(norm, entropy=entropy, end_token=end_token, survival=survival)
    compared = hidden if compared is None else compared
    change, relative_change = measure_step(compared, previous, valid_mask)
    flat, flat_before = _flat(compared.float(), valid_mask), _flat(previous.float(), valid_mask)
    distances = Distances(
        norm,
        change=change,
        relative_change=relative_change,
        cosine=1 - torch.nn.functional.cosine_similarity(flat, flat_before, dim=-1),
        entropy=entropy,
        end_token=end_token,
        learned=None if p_halt is None else 1 - p_halt,
        survival=survival,
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
    """The exit decision of one request; call :meth:`update` once per iteration, in order.

    Args:
        settings: the request's loop settings.
        guard: when an expanding loop counts as diverged.

    Attributes:
        contraction: norm of the last step divided by that of the step before; ``None`` where undefined.
        settled_iterations: iterations in a row below the threshold.
        expanding_iterations: iterations in a row with a contraction above 1.
    """

    def __init__(self, settings: ResolvedLoopParams, guard: GuardConfig) -> None:
        self.settings, self.guard = settings, guard
        self.settled_iterations = 0
        self.expanding_iterations = 0
        self.first_norm = math.nan
        self.last_change: float | None = None
        self.contraction: float | None = None

    def update(
        self, t: int, *, distance: float | None, change: float | None, norm: float, finite: bool = True
    ) -> ExitReason | None:
        """Record iteration ``t`` and return why the loop ends with it; ``None``: it goes on.

        Args:
            t: the iteration just run, from 1.
            distance: the criterion's value; ``None``: undefined, which never counts as settled.
            change: norm of the step; ``None``: there is no earlier state.
            norm: norm of the new state.
            finite: whether all values of the new state are finite.
        """
        self.contraction = change / self.last_change if change is not None and self.last_change else None
        self.last_change = change
        if t == 1:
            self.first_norm = norm
        expands = self.contraction is not None and self.contraction > 1
        self.expanding_iterations = self.expanding_iterations + 1 if expands else 0
        far = norm > self.guard.norm_factor * self.first_norm
        if not finite or (self.expanding_iterations >= self.guard.expanding_iterations and far):
            return "diverged"

        below = distance is not None and distance < self.settings.threshold
        self.settled_iterations = self.settled_iterations + 1 if below and self.settings.criterion != "fixed" else 0
        if t >= self.settings.min_iterations and self.settled_iterations >= self.settings.patience:
            return "converged"
        return "max_iterations" if t >= self.settings.max_iterations else None

    def last_good_iteration(self, t: int, finite: bool) -> int:
        """The iteration whose state is decoded after a divergence at ``t``: the last one before it began.

        Args:
            t: the iteration at which the loop ended.
            finite: whether all values of its state are finite.
        """
        return t - 1 if not finite else max(0, t - self.expanding_iterations)
