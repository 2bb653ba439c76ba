"""Step-level supervision through a decoder: the objective ``thoughts``.

SIM-CoT (Wei et al., 2025, arXiv 2509.20317): an auxiliary decoder predicts step k from latent state k, so that latent
states stay distinct and training is stable. SIM-CoT drops the decoder after training; here it stays as the
``latent_decoder``, which decodes the thoughts of a trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, token_loss


def thoughts(rollout: Rollout) -> Mean:
    """Cross-entropy of each step's tokens and an end token, decoded from the state that ends the step.

    In the workspaces ``block`` and ``prompt`` iterations are not steps: the whole chain is decoded from the states of
    the last iteration.
    """
    ids, in_loop = rollout.batch["step_ids"], rollout.batch["in_loop"]
    end = rollout.reasoner.tokenizer.eos_token_id
    assert isinstance(end, int)
    if rollout.reasoner.config.loop.workspace == "append":
        states, available = rollout.at_step_ends(ids.shape[1])
        memory, texts = states[available][:, None], append_end(ids[available], end)
        present = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
    else:
        memory, present = rollout.workspace[:, -1], rollout.valid_mask
        texts = append_end(ids.masked_fill(~in_loop[..., None], IGNORE).flatten(1), end)
    if not len(memory):
        return Mean(rollout.states.sum() * 0, in_loop.new_zeros((), dtype=torch.long))
    return token_loss(rollout.reasoner.decode_latent(memory, present, texts[:, :-1].clamp_min(0)), texts)


def append_end(ids: Tensor, end: int) -> Tensor:
    """Remove the gaps (-100) from rows of ids ``[N, S]`` and append the token ``end``: ``[N, S + 1]``."""
    real = ids != IGNORE
    packed = ids.gather(1, (~real).long().argsort(dim=1, stable=True))
    closed = torch.cat([packed, packed.new_full((len(ids), 1), IGNORE)], dim=1)
    return closed.scatter(1, real.sum(1, keepdim=True), end)
