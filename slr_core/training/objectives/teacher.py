"""Distillation from a larger latent reasoner: the objectives ``teacher_states`` and ``teacher_logits``.

The targets are hidden states through a learned projection, as in Romero et al., 2015 (arXiv 1412.6550), and the
distributions of the answer's tokens, as in Hinton et al., 2015 (arXiv 1503.02531). Both models loop equally long; a
language model without a loop runs once, and its distributions are the targets at every depth.
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of


def teacher_states(rollout: Rollout) -> Mean:
    """|W h_t - H_t|² / |H_t|² for every iteration t: H_t is the teacher's state, W a learned projection."""
    assert rollout.bridge is not None
    targets = rollout.teacher_rollout.states[:, 1 + rollout.detached :].float()
    states = rollout.bridge(rollout.states[:, 1 + rollout.detached :]).float()
    distance = (states - targets).pow(2).sum(-1) / targets.pow(2).sum(-1)
    return mean_of(distance, distance.isfinite())


def teacher_logits(rollout: Rollout) -> Mean:
    """KL(teacher || student) per token written after the loop."""
    target = rollout.teacher_rollout.answer_logits.float().log_softmax(-1)
    log_probs = rollout.answer_logits.float().log_softmax(-1)
    divergence = (target.exp() * (target - log_probs)).sum(-1)
    return mean_of(divergence, rollout.batch["labels"] != IGNORE)
