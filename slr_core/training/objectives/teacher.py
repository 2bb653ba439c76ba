"""A latent reasoner distilled into a smaller one: the objectives ``teacher_states`` and ``teacher_logits``.

Hidden states through a learned projection, as in Romero et al., 2015 (arXiv 1412.6550), and the distribution over
the answer's tokens, as in Hinton et al., 2015 (arXiv 1503.02531), both along a loop of the same length.
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, mean_of


def teacher_states(run: Rollout) -> Mean:
    """|W h_t - H_t|² / |H_t|² for every iteration t, W a learned projection to the teacher's width."""
    assert run.bridge is not None
    targets = run.taught.states[:, 1 + run.blind :].float()
    states = run.bridge(run.states[:, 1 + run.blind :]).float()
    distance = (states - targets).pow(2).sum(-1) / targets.pow(2).sum(-1)
    return mean_of(distance, distance.isfinite())


def teacher_logits(run: Rollout) -> Mean:
    """KL(teacher || student) per token written after the loop."""
    target = run.taught.answer_logits.float().log_softmax(-1)
    valid_mask = run.answer_logits.float().log_softmax(-1)
    divergence = (target.exp() * (target - valid_mask)).sum(-1)
    return mean_of(divergence, run.batch["labels"] != IGNORE)
