"""Step-level supervision through the LM head: the objective ``steps``.

LOTUS (arXiv 2606.31779): after the loop, every latent position is trained by cross-entropy on one token of the chain of
thought. In the workspace ``append``, thoughts are used instead of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, state_loss


def steps(rollout: Rollout) -> Mean:
    """Cross-entropy of token j of step k at position c·(k-1) + j, for j = 1 ... c; further tokens are ignored.

    With ``supervised: every``, the mean over all iterations, where step k counts from iteration k on: before, the steps
    that it needs are not there yet. With ``supervised: chain``, position p is asked for token p + 1 of the written
    chain, in every iteration: a state learns what the loop will end with, as in consistency language models (Kou et
    al., 2024, arXiv 2403.00835).

    With ``supervised: chain`` in the workspace ``append``, thought t is asked for token t + 1 of the chain and the
    mark after it.
    """
    config = rollout.config
    if config.thinks_by_token(rollout.reasoner.config.loop):
        return _token_by_token(rollout)
    if config.supervised == "chain":
        written = rollout.batch["cot_ids"][:, 1:]
        ends = rollout.batch["mark_at"][:, None]  # an index into cot_ids: position p is asked for p + 1
        order = torch.arange(written.shape[1], device=written.device)
        return _at_every_iteration(rollout, written.masked_fill(order >= ends, IGNORE)[:, None])
    states, first = rollout.states_by_position()
    ids, per_step = rollout.batch["step_ids"], config.thoughts_per_step
    labels = ids.new_full((*ids.shape[:2], per_step), IGNORE)
    labels[..., : min(per_step, ids.shape[2])] = ids[..., :per_step]
    labels = labels.masked_fill(~rollout.batch["in_loop"][..., None], IGNORE).flatten(1)
    if config.supervised == "every":
        iterations = torch.arange(rollout.detached + 1, rollout.iterations + 1, device=labels.device)
        step = torch.arange(labels.shape[1], device=labels.device) // per_step + 1
        return _at_every_iteration(rollout, labels[:, None].masked_fill(step > iterations[:, None], IGNORE))
    shared = min(labels.shape[1], states.shape[1])
    return state_loss(rollout.reasoner, states[:, first:shared], labels[:, first:shared])


def _token_by_token(rollout: Rollout) -> Mean:
    ids, end = rollout.batch["cot_ids"], rollout.batch["mark_at"][:, None]
    order = torch.arange(rollout.detached + 1, rollout.iterations + 1, device=ids.device)
    labels = ids.gather(1, order.clamp_max(end)).masked_fill(order > end, IGNORE)
    return state_loss(rollout.reasoner, rollout.states[:, rollout.detached + 1 :], labels)


def _at_every_iteration(rollout: Rollout, labels: Tensor) -> Mean:
    """Cross-entropy at a block's positions after every iteration with gradients: labels ``[B, T or 1, P]``."""
    states = rollout.workspace[:, rollout.detached + 1 :]
    shared = min(labels.shape[-1], states.shape[2])
    labels = labels[..., :shared].expand(-1, states.shape[1], -1)
    return state_loss(rollout.reasoner, states[:, :, :shared], labels)
