"""The search frontier of a graph in superposition: the objectives ``frontier`` and ``chains``.

A state that holds a set of nodes at once is what continuous thoughts can do and words cannot (Zhu et al., 2025,
arXiv 2505.12514); here it is asked for outright.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.loop.context import Context
from slr_core.loop.projection import rms_normalize
from slr_core.model.reasoner import LatentReasoner
from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Mean, Rollout, mean_of


def frontier(run: Rollout) -> Mean:
    """The head at h_t against the uniform distribution over the nodes at distance t from the person asked about.

    Once the target's distance is passed, against the first token of the answer: a finished state says so and stays.
    """
    return set_divergence(run.reasoner.head(run.states[:, 1 + run.blind :]), run.batch["targets"][:, run.blind :])


def chains(run: Rollout) -> Mean:
    """The same from other start nodes of the same graph, run side by side over the one cached prompt.

    A prompt costs far more than a thought: this multiplies the supervision per graph.
    """
    targets = run.batch["chain_targets"][:, :, : run.iterations]
    return side_by_side(run.reasoner, run.prompt.fork(), run.batch["chain_starts"], targets, run.plan.chains_after)


def set_divergence(logits: Tensor, targets: Tensor) -> Mean:
    """KL(uniform over each target set || head): logits ``[..., V]``, targets ``[..., K]`` padded with -100.

    Empty sets do not count. Zero means that the head spreads its mass evenly over exactly the set.
    """
    inside = targets != IGNORE
    count = inside.sum(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0))
    mean = (log_probabilities * inside).sum(-1) / count.clamp_min(1)
    return mean_of(-mean - count.clamp_min(1).log(), count > 0)


def side_by_side(reasoner: LatentReasoner, prompt: Context, starts: Tensor, targets: Tensor, after: int = 0) -> Mean:
    """The frontier objective from ``Q`` other starts: starts ``[B, Q, 2]``, targets ``[B, Q, S, K]``.

    A chain starts from the mean of its start nodes' embeddings where a question's loop starts from h_0;
    chains share the prompt's columns and positions and do not see each other. Their first iteration is
    ``after + 1``, as if so many had gone before.
    """
    rows, count, length = targets.shape[:3]
    hidden = initial = rms_normalize(reasoner.embed(starts).mean(2))
    itself = torch.eye(count, dtype=torch.bool, device=starts.device)
    prompt_seen = prompt.visible[:, None].expand(-1, count, -1)
    present = torch.ones(rows, count, dtype=torch.bool, device=starts.device)
    first_position = prompt.next_position + after
    states = []
    for t in range(1, length + 1):
        mask = torch.cat([prompt_seen, itself.repeat(1, t).expand(rows, -1, -1)], dim=-1)
        positions = (first_position + t - 1)[:, None].expand(-1, count)
        _, hidden = reasoner.update(
            hidden,
            initial,
            after + t,
            lambda u, mask=mask, positions=positions: reasoner.forward_chunk(  # type: ignore[misc]
                prompt, u, present, mask=mask, positions=positions
            ),
        )
        states.append(hidden)
    return set_divergence(reasoner.head(torch.stack(states, dim=2)), targets)
