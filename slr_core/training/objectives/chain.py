"""The written chain of thought, over the same cached prompt: the objectives ``cot`` and ``cot_states``.

``cot`` trains the un-looped model on chain and answer, CODI's teacher task (Shen et al., 2025, arXiv 2502.21074).
``cot_states`` uses hidden states of that pass as targets, like CCoT (Cheng and Van Durme, 2024, arXiv 2412.13171).
"""

from __future__ import annotations

import torch

from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of, state_loss


def cot(rollout: Rollout) -> Mean:
    """Cross-entropy of chain, mark and answer, written by the un-looped model."""
    return state_loss(rollout.reasoner, rollout.chain_outputs.before, rollout.batch["cot_ids"])


def cot_states(rollout: Rollout) -> Mean:
    """|h - c|² / |c|²: h is the latent state that ends a step, c the detached state at the step's last token."""
    ends = rollout.batch["step_ends"]
    states, available = rollout.at_step_ends(ends.shape[1])
    rows = torch.arange(len(ends), device=ends.device)[:, None]
    targets = rollout.chain_outputs.states[rows, ends.clamp_min(0)].detach().float()
    distance = (states.float() - targets).pow(2).sum(-1) / targets.pow(2).sum(-1)
    return mean_of(distance, available & (ends >= 0))
