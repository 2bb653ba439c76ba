"""A loop that contracts: the objective ``contraction``.

By Banach's theorem a map that shortens every distance by a fixed share has one fixed point and reaches it; the penalty
asks that of the steps that the loop takes (Jacobian regularisation does so of all: Bai et al., 2021, arXiv 2106.14342).
"""

from __future__ import annotations

from torch import Tensor

from slr_core.training.objectives.rollout import Mean, Rollout, mean_of

_LEAST = 1e-3  # of |h|: the ratio of shorter steps is noise


def contraction(run: Rollout) -> Mean:
    """max(0, |h_t - h_{t-1}| / |h_{t-1} - h_{t-2}| - share)², against the detached earlier step."""
    first = run.blind if run.reasoner.is_state(run.blind) else run.blind + 1
    valid_mask = run.workspace.masked_fill(~run.valid_mask[:, None, :, None], 0).flatten(2)
    return expansion(valid_mask[:, first:], run.config.contraction)


def expansion(states: Tensor, share: float) -> Mean:
    """The penalty on states ``[B, T + 1, d]`` in order."""
    steps = (states[:, 1:] - states[:, :-1]).float()
    length = (steps.pow(2).sum(-1) + 1e-12).sqrt()
    before = length[:, :-1].detach()
    moving = before > _LEAST * states[:, 1:-1].detach().float().norm(dim=-1)
    return mean_of((length[:, 1:] / before - share).clamp_min(0).pow(2), moving)
