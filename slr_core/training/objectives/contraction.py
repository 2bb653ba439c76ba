"""A loop that contracts: the objective ``contraction``.

By Banach's theorem, iterating a map that shortens every distance to at most a fixed share converges to a unique fixed
point. The penalty demands this of the steps that the loop takes; Jacobian regularisation demands it of all directions
(Bai et al., 2021, arXiv 2106.14342).
"""

from __future__ import annotations

from torch import Tensor

from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of

_MIN_STEP = 1e-3  # relative to |h|; the ratio of shorter steps is noise


def contraction(rollout: Rollout) -> Mean:
    """max(0, |h_t - h_{t-1}| / |h_{t-1} - h_{t-2}| - share)², with the earlier step detached."""
    first = rollout.detached if rollout.reasoner.is_state(rollout.detached) else rollout.detached + 1
    states = rollout.workspace.masked_fill(~rollout.valid_mask[:, None, :, None], 0).flatten(2)
    return expansion_penalty(states[:, first:], rollout.config.contraction)


def expansion_penalty(states: Tensor, share: float) -> Mean:
    """The penalty on consecutive states ``[B, T + 1, d]``."""
    steps = (states[:, 1:] - states[:, :-1]).float()
    length = (steps.pow(2).sum(-1) + 1e-12).sqrt()
    before = length[:, :-1].detach()
    long_enough = before > _MIN_STEP * states[:, 1:-1].detach().float().norm(dim=-1)
    return mean_of((length[:, 1:] / before - share).clamp_min(0).pow(2), long_enough)
