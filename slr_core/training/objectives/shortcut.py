"""Loops of different length agree: the objective ``shortcut``.

LoopFormer (arXiv 2602.11451) aligns shorter trajectories with the full one; here the full loop's last state is the
detached target of a state drawn from the way to it.
"""

from __future__ import annotations

import torch

from slr_core.training.objectives.rollout import Mean, Rollout, mean_of


def shortcut(run: Rollout) -> Mean:
    """|h_s - h_T|² / |h_T|² + KL(head at h_T || head at h_s), s drawn per question from 1 ... T - 1."""
    short = run.batch["short"]
    rows = torch.arange(len(short), device=short.device)
    early, late = run.states[rows, short], run.states[:, -1].detach()
    distance = (early - late).float().pow(2).sum(-1) / late.float().pow(2).sum(-1)
    target = run.reasoner.head(late).detach().float().log_softmax(-1)
    valid_mask = run.reasoner.head(early).float().log_softmax(-1)
    return mean_of(distance + (target.exp() * (target - valid_mask)).sum(-1), short > run.blind)
