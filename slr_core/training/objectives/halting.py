"""Train the halting head: the objective ``halting``.

As in the second stage of Ouro (arXiv 2510.25741), the halting head learns by cross-entropy whether more iterations
would still lower the loss. The states are detached, so that only the head learns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of

SHARPNESS, MARGIN = 50.0, 0.05
"""Ouro's k, and the smallest decrease of the loss in nats that is worth another iteration."""


def halting(rollout: Rollout) -> Mean:
    """Cross-entropy of p_halt at h_1 ... h_T against :func:`stop_targets`."""
    assert rollout.reasoner.halting is not None
    states = rollout.states[:, 1:].detach()
    logits = rollout.reasoner.head(states).detach().float()
    first = rollout.batch["first"][:, None].expand(-1, states.shape[1])
    target = stop_targets(F.cross_entropy(logits.transpose(1, 2), first, reduction="none"))
    if rollout.reasoner.workspace.per_token:
        halted = rollout.reasoner.halting(states[:, :, None], None)
    else:
        halted = rollout.reasoner.halting(
            rollout.workspace[:, 1:].detach(), rollout.valid_mask[:, None].expand(-1, states.shape[1], -1)
        )
    return mean_of(F.binary_cross_entropy(halted, target, reduction="none"), target.isfinite())


def stop_targets(losses: Tensor) -> Tensor:
    """sigmoid(k · (margin - gain)) with gain = loss - lowest loss from here on: losses ``[B, T]``."""
    best = losses.flip(-1).cummin(-1).values.flip(-1)
    return (SHARPNESS * (MARGIN - (losses - best))).sigmoid()
