"""Pre-training with loops: the objective ``text``.

Huginn (Geiping et al., 2025, arXiv 2502.05171): next-token prediction on plain text through a recurrent model
whose number of iterations is drawn anew for every batch (:class:`slr_core.training.stages.SampledIterations`).
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, token_loss


def text(run: Rollout) -> Mean:
    """Cross-entropy of the prompt's own tokens, each predicted where the closing pass has the one before it."""
    passes = run.closed.passes
    assert passes is not None
    ids, valid_mask = run.batch["input_ids"], run.batch["attention_mask"].bool()
    labels = ids.masked_fill(~valid_mask, IGNORE)[:, 1:]
    return token_loss(run.reasoner.head(passes[run.iterations][-1][:, :-1]), labels)
