"""Step-level supervision through a decoder: the objective ``thoughts``.

SIM-CoT (Wei et al., 2025, arXiv 2509.20317): an auxiliary decoder writes step k from latent state k, which keeps
the latent states apart and stable. There the decoder is dropped after training; here it stays as the
``latent_decoder``, which puts the thoughts of a trace into words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, token_loss


def thoughts(run: Rollout) -> Mean:
    """Cross-entropy of each step's tokens, and an end token, read from the state that ends it.

    In the workspaces ``block`` and ``prompt`` an iteration is not a step: the last iteration's states say the
    whole chain.
    """
    ids, in_loop = run.batch["step_ids"], run.batch["in_loop"]
    end = run.reasoner.tokenizer.eos_token_id
    assert isinstance(end, int)
    if run.reasoner.config.loop.workspace == "append":
        states, there = run.at_step_ends(ids.shape[1])
        memory, texts = states[there][:, None], ended(ids[there], end)
        present = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
    else:
        memory, present = run.workspace[:, -1], run.valid_mask
        texts = ended(ids.masked_fill(~in_loop[..., None], IGNORE).flatten(1), end)
    if not len(memory):
        return Mean(run.states.sum() * 0, in_loop.new_zeros((), dtype=torch.long))
    return token_loss(run.reasoner.decode_latent(memory, present, texts[:, :-1].clamp_min(0)), texts)


def ended(ids: Tensor, end: int) -> Tensor:
    """Rows of ids ``[N, S]`` with gaps of -100, moved together and closed by ``end``: ``[N, S + 1]``."""
    real = ids != IGNORE
    packed = ids.gather(1, (~real).long().argsort(dim=1, stable=True))
    closed = torch.cat([packed, packed.new_full((len(ids), 1), IGNORE)], dim=1)
    return closed.scatter(1, real.sum(1, keepdim=True), end)
