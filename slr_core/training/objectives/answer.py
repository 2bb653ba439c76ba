"""What is written after the loop: the objectives ``answer`` and ``start``.

Under a curriculum (:class:`slr_core.training.stages.CurriculumConfig`), ``answer`` also covers the steps that
are left in words: Coconut, Hao et al., 2024 (arXiv 2412.06769).
"""

from __future__ import annotations

import torch.nn.functional as F

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, mean_of, token_loss


def answer(run: Rollout) -> Mean:
    """Cross-entropy of the tokens written after each row's exit, by the LM head or by the latent decoder."""
    labels = run.batch["labels"]
    if run.reasoner.answers_from_states and run.iterations:
        # Without an iteration there is no state that the decoder could read.
        labels = labels.masked_fill((run.exits == 0)[:, None], IGNORE)
    return token_loss(run.answer_logits, labels)


def start(run: Rollout) -> Mean:
    """Cross-entropy of the answer's first token at h_0, which keeps the un-looped model meaningful."""
    first = run.batch["first"]
    return mean_of(F.cross_entropy(run.reasoner.head(run.start).float(), first, reduction="none"), first >= 0)
