"""Shorter loops agree with the full loop: the objective ``shortcut``.

LoopFormer (arXiv 2602.11451) aligns shorter trajectories with the full one. Here the detached last state of the loop is
the target of an earlier state, drawn at random.
"""

from __future__ import annotations

import torch

from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of


def shortcut(rollout: Rollout) -> Mean:
    """|h_s - h_T|² / |h_T|² + KL(head at h_T || head at h_s), with s drawn for each question from 1 ... T - 1."""
    short = rollout.batch["short"]
    rows = torch.arange(len(short), device=short.device)
    early, late = rollout.states[rows, short], rollout.states[:, -1].detach()
    distance = (early - late).float().pow(2).sum(-1) / late.float().pow(2).sum(-1)
    target = rollout.reasoner.head(late).detach().float().log_softmax(-1)
    log_probs = rollout.reasoner.head(early).float().log_softmax(-1)
    return mean_of(distance + (target.exp() * (target - log_probs)).sum(-1), short > rollout.detached)
