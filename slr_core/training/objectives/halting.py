"""When to stop, learned: the objective ``halting``.

As in the second stage of Ouro (arXiv 2510.25741): the gate learns, by cross-entropy, whether more iterations would
still lower the loss; the states themselves are not moved by it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slr_core.training.objectives.rollout import Mean, Rollout, mean_of

SHARPNESS, MARGIN = 50.0, 0.05
"""Ouro's k, and the gain in nats that is not worth another iteration."""


def halting(run: Rollout) -> Mean:
    """Cross-entropy of p_halt at h_1 ... h_T against :func:`worth_stopping`."""
    assert run.reasoner.halting is not None
    states = run.states[:, 1:].detach()
    logits = run.reasoner.head(states).detach().float()
    first = run.batch["first"][:, None].expand(-1, states.shape[1])
    target = worth_stopping(F.cross_entropy(logits.transpose(1, 2), first, reduction="none"))
    halted = run.reasoner.halting(
        run.workspace[:, 1:].detach(), run.valid_mask[:, None].expand(-1, states.shape[1], -1)
    )
    return mean_of(F.binary_cross_entropy(halted, target, reduction="none"), target.isfinite())


def worth_stopping(losses: Tensor) -> Tensor:
    """sigmoid(k · (margin - gain)), the gain being what the best later iteration saves: losses ``[B, T]``."""
    best = losses.flip(-1).cummin(-1).values.flip(-1)
    return (SHARPNESS * (MARGIN - (losses - best))).sigmoid()
