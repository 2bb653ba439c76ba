"""Cross-entropy of the text after the loop, and of the un-looped model: the objectives ``answer`` and ``start``.

In a curriculum (:class:`slr_core.training.stages.CurriculumConfig`), ``answer`` also covers the steps that are still
written: Coconut, Hao et al., 2024 (arXiv 2412.06769).
"""

from __future__ import annotations

import torch.nn.functional as F

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout, mean_over_exits
from slr_core.training.objectives.token_loss import Mean, mean_of, state_loss, token_loss


def answer(rollout: Rollout) -> Mean:
    """Cross-entropy of the tokens written after each row's exit, by the LM head or by the latent decoder.

    In the workspace ``token``, the mean over every iteration that has gradients: each is a possible exit.
    """
    labels = rollout.batch["labels"]
    if rollout.reasoner.workspace.per_token and rollout.iterations:
        return mean_over_exits(rollout.reasoner, rollout.states_per_token[:, rollout.detached :], labels)
    if rollout.reasoner.answers_from_states and rollout.iterations:
        # The latent decoder reads states of iterations: there are none at exit 0.
        labels = labels.masked_fill((rollout.exits == 0)[:, None], IGNORE)
        return token_loss(rollout.answer_logits, labels)
    return state_loss(rollout.reasoner, rollout.answer_states, labels)


def start(rollout: Rollout) -> Mean:
    """Cross-entropy of the answer's first token at h_0, before a loop: keeps the un-looped model usable."""
    first = rollout.batch["first"]
    return mean_of(F.cross_entropy(rollout.reasoner.head(rollout.start).float(), first, reduction="none"), first >= 0)
