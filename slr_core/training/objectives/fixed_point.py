"""A finished loop stays where it is: the objective ``fixed_point``.

Its idea is that of deep equilibrium models (Bai et al., 2019, arXiv 1909.01377): the answer is a state that one
more iteration does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.training.objectives.rollout import Mean, Rollout, mean_of


def fixed_point(run: Rollout) -> Mean:
    """|h_t - h_{t-1}|² / |h_{t-1}|² for every t after the work and one more, against the detached h_{t-1}."""
    return rest(run.states[:, run.blind :], run.batch["work"] - run.blind)


def rest(states: Tensor, work: Tensor) -> Mean:
    """Squared relative changes of the steps after the work is done: states ``[B, T + 1, d]``, work ``[B]``.

    The first state stands for h_0, which no step leads to and whose own step does not count.
    """
    previous = states[:, 1:-1].detach()
    change = (states[:, 2:] - previous).pow(2).sum(-1) / previous.pow(2).sum(-1)
    return mean_of(change, torch.arange(2, states.shape[1], device=work.device) > work[:, None] + 1)
