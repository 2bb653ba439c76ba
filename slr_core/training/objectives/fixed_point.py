"""Further iterations do not change a finished loop's state: the objective ``fixed_point``.

As in deep equilibrium models (Bai et al., 2019, arXiv 1909.01377), the answer is read at a fixed point of the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of


def fixed_point(rollout: Rollout) -> Mean:
    """|h_t - h_{t-1}|² / |h_{t-1}|² for every t > d + 1, with h_{t-1} detached."""
    return settled_change(rollout.states[:, rollout.detached :], rollout.batch["work"] - rollout.detached)


def settled_change(states: Tensor, work: Tensor) -> Mean:
    """Squared relative changes at iterations t > work + 1: states ``[B, T + 1, d]`` from h_0 on, work ``[B]``.

    The step from h_0 never counts.
    """
    previous = states[:, 1:-1].detach()
    change = (states[:, 2:] - previous).pow(2).sum(-1) / previous.pow(2).sum(-1)
    return mean_of(change, torch.arange(2, states.shape[1], device=work.device) > work[:, None] + 1)
