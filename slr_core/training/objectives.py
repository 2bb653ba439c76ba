"""The loss terms of a latent loop that is supervised at every iteration.

With d the number of hops from the person asked about to the right answer:

- ``frontier``: for t <= d the head at h_t is trained towards the uniform distribution over the nodes at
  distance t (the breadth-first frontier in superposition: Zhu et al., 2025, arXiv 2505.12514); for t > d
  towards the first token of the answer, so that a finished state says so and stays.
- ``chains``: the same from other start nodes of the same graph, run side by side over the one cached
  prompt. A prompt costs far more than a thought: this multiplies the supervision per graph.
- ``answer``: cross-entropy of the answer's tokens, written from an exit drawn from d + 1 ... T.
- ``start``: h_0 towards the answer's first token, which keeps the un-looped model meaningful.
- ``fixed_point``: |h_t - h_{t-1}|^2 / |h_{t-1}|^2 for t > d + 1, against the detached h_{t-1}.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_core.context import Context
from slr_core.loop.projection import rms_normalize
from slr_core.loop.workspace import readout
from slr_core.model import LatentReasoner
from slr_core.training.config import ObjectiveWeights
from slr_core.training.data import IGNORE, LoopPlan


def losses(reasoner: LatentReasoner, batch: dict[str, Any], weights: ObjectiveWeights) -> dict[str, Tensor]:
    """Every loss term that has a weight, unweighted, as scalars; see the module's text.

    Args:
        reasoner: the model, in training mode.
        batch: from :class:`slr_core.training.data.Collator`.
        weights: terms of weight 0 are not computed.
    """
    context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
    prompt = context.fork()
    plan: LoopPlan = batch["plan"]
    iterations, hops, answer = plan.iterations, batch["hops"], batch["answer_ids"]
    workspace = reasoner.unroll(context, iterations, plan.backprop)
    states = readout(workspace, context.own)
    # States without a gradient teach nothing, and would only thin out the means.
    blind = 0 if plan.backprop is None else max(0, iterations - plan.backprop)
    if iterations == 0:
        reasoner.close(context, workspace, torch.zeros_like(hops))
    start = context.state
    terms = {}
    if weights.start or iterations == 0:
        terms["start"] = F.cross_entropy(reasoner.head(start), answer[:, 0])
    if weights.frontier and iterations:
        terms["frontier"] = set_divergence(reasoner.head(states[:, 1 + blind :]), batch["targets"][:, blind:])
    if weights.fixed_point and iterations > 1:
        terms["fixed_point"] = fixed_point(states[:, blind:], hops - blind)
    if weights.chains and iterations and batch["chain_starts"] is not None:
        targets = batch["chain_targets"][:, :, :iterations]
        terms["chains"] = chains(reasoner, prompt, batch["chain_starts"], targets, plan.chains_after)
    if weights.answer:
        if iterations:
            reasoner.close(context, workspace, batch["exits"])
        terms["answer"] = answer_loss(reasoner, context, answer, torch.full_like(hops, iterations).bool())
    return terms


def set_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean KL(uniform over each target set || head): logits ``[..., V]``, targets ``[..., K]`` padded with -100.

    Empty sets do not count. Zero means that the head spreads its mass evenly over exactly the set.
    """
    inside = targets != IGNORE
    count = inside.sum(-1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0))
    mean = (log_probabilities * inside).sum(-1) / count.clamp_min(1)
    divergence = -mean - count.clamp_min(1).log()
    return (divergence * (count > 0)).sum() / (count > 0).sum().clamp_min(1)


def fixed_point(states: Tensor, hops: Tensor) -> Tensor:
    """Mean squared relative change of the steps after the work is done: states ``[B, T + 1, d]``, hops ``[B]``.

    The first state stands for h_0, which no step leads to and whose own step does not count.
    """
    previous = states[:, 1:-1].detach()
    change = (states[:, 2:] - previous).pow(2).sum(-1) / previous.pow(2).sum(-1)
    done = torch.arange(2, states.shape[1], device=hops.device) > hops[:, None] + 1
    return (change * done).sum() / done.sum().clamp_min(1)


def answer_loss(reasoner: LatentReasoner, context: Context, answer: Tensor, looped: Tensor) -> Tensor:
    """Cross-entropy of ``answer`` ``[B, A]``: the first token at the context's state, the rest teacher-forced."""
    inputs, present = answer[:, :-1].clamp_min(0), answer[:, :-1] != IGNORE
    first = reasoner.head(context.state)[:, None]
    rest = reasoner.answer(context, inputs, present, looped)
    return F.cross_entropy(torch.cat([first, rest], dim=1).transpose(1, 2), answer, ignore_index=IGNORE)


def chains(reasoner: LatentReasoner, prompt: Context, starts: Tensor, targets: Tensor, after: int = 0) -> Tensor:
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
            lambda u, mask=mask, positions=positions: reasoner.advance(  # type: ignore[misc]
                prompt, u, present, mask=mask, positions=positions
            ),
        )
        states.append(hidden)
    return set_divergence(reasoner.head(torch.stack(states, dim=2)), targets)
