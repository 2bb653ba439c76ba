"""Pre-training on plain text: the objective ``text``.

Huginn (Geiping et al., 2025, arXiv 2502.05171): next-token prediction by a recurrent model whose number of iterations
is drawn for every batch (:class:`slr_core.training.stages.SampledIterations`).
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, token_loss


def text(rollout: Rollout) -> Mean:
    """Cross-entropy of the prompt's tokens, predicted by the closing pass at the position before each."""
    passes = rollout.closed_context.passes
    assert passes is not None
    ids, valid_mask = rollout.batch["input_ids"], rollout.batch["attention_mask"].bool()
    labels = ids.masked_fill(~valid_mask, IGNORE)[:, 1:]
    return token_loss(rollout.reasoner.head(passes[rollout.iterations][-1][:, :-1]), labels)
