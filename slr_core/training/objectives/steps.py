"""Step-level supervision through the LM head: the objective ``steps``.

LOTUS (arXiv 2606.31779): after the loop, every latent position is trained by plain cross-entropy on its own token of
the chain of thought. In the workspace ``append`` the thoughts take the place of positions.
"""

from __future__ import annotations

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, token_loss


def steps(run: Rollout) -> Mean:
    """Position c·(k-1) + j against token j of step k, j = 1 ... c; longer steps are cut, shorter ones leave gaps."""
    states, first = run.by_position()
    ids, per_step = run.batch["step_ids"], run.config.thoughts_per_step
    labels = ids.new_full((*ids.shape[:2], per_step), IGNORE)
    labels[..., : min(per_step, ids.shape[2])] = ids[..., :per_step]
    labels = labels.masked_fill(~run.batch["in_loop"][..., None], IGNORE).flatten(1)
    shared = min(labels.shape[1], states.shape[1])
    return token_loss(run.reasoner.head(states[:, first:shared]), labels[:, first:shared])
