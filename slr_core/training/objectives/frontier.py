"""The breadth-first frontier of a graph, in superposition: the objectives ``frontier`` and ``chains``.

A continuous thought can represent a set of nodes at once, a token cannot (Zhu et al., 2025, arXiv 2505.12514). These
objectives train states to represent the frontier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.loop.context import Context
from slr_core.loop.projection import rms_normalize
from slr_core.reasoner import LatentReasoner
from slr_core.training.data import IGNORE
from slr_core.training.objectives.rollout import Rollout
from slr_core.training.objectives.token_loss import Mean, mean_of


def frontier(rollout: Rollout) -> Mean:
    """KL from the uniform distribution over the nodes at distance t from the question's start node to the head at h_t.

    Beyond the distance of the answer's node, the target is the first token of the answer.
    """
    return set_divergence(
        rollout.reasoner.head(rollout.states[:, 1 + rollout.detached :]),
        rollout.batch["targets"][:, rollout.detached :],
    )


def chains(rollout: Rollout) -> Mean:
    """The same from other start nodes of the same graph, in parallel over the same cached prompt.

    A thought costs much less than a prompt, so this gives more supervision per graph at little cost.
    """
    targets = rollout.batch["chain_targets"][:, :, : rollout.iterations]
    return chain_divergence(
        rollout.reasoner, rollout.prompt.fork(), rollout.batch["chain_starts"], targets, rollout.plan.chains_after
    )


def set_divergence(logits: Tensor, targets: Tensor) -> Mean:
    """KL(uniform over each target set || head): logits ``[..., V]``, targets ``[..., K]`` padded with -100.

    Empty sets do not count. The divergence is 0 if the head is uniform over exactly the set.
    """
    inside = targets != IGNORE
    count = inside.sum(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0))
    mean = (log_probabilities * inside).sum(-1) / count.clamp_min(1)
    return mean_of(-mean - count.clamp_min(1).log(), count > 0)


def chain_divergence(
    reasoner: LatentReasoner, prompt: Context, starts: Tensor, targets: Tensor, after: int = 0
) -> Mean:
    """The frontier objective from ``Q`` other start nodes: starts ``[B, Q, 2]``, targets ``[B, Q, S, K]``.

    A chain starts from the mean embedding of its start nodes instead of h_0. All chains attend to the prompt, use the
    same position ids and do not attend to each other. Their first iteration is number ``after + 1``.
    """
    rows, count, length = targets.shape[:3]
    hidden = initial = rms_normalize(reasoner.embed(starts).mean(2))
    same_chain = torch.eye(count, dtype=torch.bool, device=starts.device)
    prompt_seen = prompt.visible[:, None].expand(-1, count, -1)
    present = torch.ones(rows, count, dtype=torch.bool, device=starts.device)
    first_position = prompt.next_position + after
    states = []
    for t in range(1, length + 1):
        mask = torch.cat([prompt_seen, same_chain.repeat(1, t).expand(rows, -1, -1)], dim=-1)
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
