"""The chain of thought in words, over the same cached prompt: the objectives ``cot`` and ``cot_states``.

``cot`` trains the un-looped model on chain and answer, CODI's teacher task (Shen et al., 2025, arXiv 2502.21074).
``cot_states`` takes that run's hidden states as targets, as CCoT does (Cheng and Van Durme, 2024, arXiv 2412.13171).
"""

from __future__ import annotations

import torch

from slr_core.training.objectives.rollout import Mean, Rollout, mean_of, token_loss


def cot(run: Rollout) -> Mean:
    """Cross-entropy of chain, mark and answer, written by the un-looped model."""
    return token_loss(run.in_words.logits, run.batch["cot_ids"])


def cot_states(run: Rollout) -> Mean:
    """|h - c|² / |c|² with h the state that ends a step in the loop, c the one after its last word, detached."""
    ends = run.batch["step_ends"]
    states, there = run.at_step_ends(ends.shape[1])
    rows = torch.arange(len(ends), device=ends.device)[:, None]
    targets = run.in_words.states[rows, ends.clamp_min(0)].detach().float()
    distance = (states.float() - targets).pow(2).sum(-1) / targets.pow(2).sum(-1)
    return mean_of(distance, there & (ends >= 0))
