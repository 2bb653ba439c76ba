"""Step-level supervision through the LM head: the objective ``steps``.

LOTUS (arXiv 2606.31779): after the loop, every latent position is trained by cross-entropy on one token of the chain of
thought. In the workspace ``append``, thoughts are used instead of positions.
"""

from __future__ import annotations

import torch

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, state_loss


def steps(rollout: Rollout) -> Mean:
    """Cross-entropy of token j of step k at position c·(k-1) + j, for j = 1 ... c; further tokens are ignored.

    With ``supervised: every``, the mean over all iterations, where step k counts from iteration k on: before, the steps
    that it needs are not there yet.
    """
    states, first = rollout.states_by_position()
    ids, per_step = rollout.batch["step_ids"], rollout.config.thoughts_per_step
    labels = ids.new_full((*ids.shape[:2], per_step), IGNORE)
    labels[..., : min(per_step, ids.shape[2])] = ids[..., :per_step]
    labels = labels.masked_fill(~rollout.batch["in_loop"][..., None], IGNORE).flatten(1)
    shared = min(labels.shape[1], states.shape[1])
    if rollout.config.supervised == "last":
        return state_loss(rollout.reasoner, states[:, first:shared], labels[:, first:shared])
    # Iterations [B, T, W]: step k is position c·(k-1) ... c·k - 1.
    iterations = torch.arange(rollout.detached + 1, rollout.iterations + 1, device=labels.device)
    step = torch.arange(shared, device=labels.device) // per_step + 1
    early = step > iterations[:, None]
    labels = labels[:, None, :shared].masked_fill(early, IGNORE)
    return state_loss(rollout.reasoner, rollout.workspace[:, rollout.detached + 1 :, :shared], labels)
