"""Pre-training on plain text: the objective ``text``.

Huginn (Geiping et al., 2025, arXiv 2502.05171): next-token prediction by a recurrent model whose number of iterations
is drawn for every batch (:class:`slr_core.training.stages.SampledIterations`).
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout, mean_over_exits
from slr_core.training.objectives.token_loss import Mean, token_loss


def text(rollout: Rollout) -> Mean:
    """Cross-entropy of the prompt's tokens, predicted at the position before each.

    In the workspace ``prompt`` by the closing pass; in ``token`` the mean over every iteration that has gradients: each
    is a possible exit.
    """
    ids, valid_mask = rollout.batch["input_ids"], rollout.batch["attention_mask"].bool()
    labels = ids.masked_fill(~valid_mask, IGNORE)[:, 1:]
    if rollout.reasoner.workspace.per_token and rollout.iterations:
        states = rollout.workspace[:, 1 + rollout.detached :, :-1]
        return mean_over_exits(rollout.reasoner, states, labels)
    passes = rollout.closed_context.passes
    assert passes is not None
    # A pass holds the final norm's output: the head alone reads it, under feedback `raw` too.
    head = rollout.reasoner.base.get_output_embeddings()  # type: ignore[no-untyped-call]
    return token_loss(head(passes[rollout.iterations][-1][:, :-1]), labels)
