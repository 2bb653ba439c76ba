"""One batch through the loop, once: what all objectives read."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slr_core.loop.context import Context
from slr_core.loop.workspace import readout
from slr_core.model.reasoner import LatentReasoner
from slr_core.training.config import TrainConfig
from slr_core.training.data import IGNORE, LoopPlan


class Mean(NamedTuple):
    """A mean that is not divided yet, so that devices can share one denominator: fp32 scalars."""

    total: Tensor
    divisor: Tensor

    @property
    def value(self) -> Tensor:
        """The mean; 0 where nothing counts."""
        return self.total / self.divisor.clamp_min(1)


def mean_of(values: Tensor, counts: Tensor) -> Mean:
    """Mean of ``values`` where ``counts`` (a bool tensor of the same shape)."""
    # Not a product: what does not count may be infinite, and 0 * inf is NaN.
    return Mean(values.masked_fill(~counts, 0).sum(), counts.sum())


def token_loss(logits: Tensor, labels: Tensor) -> Mean:
    """Cross-entropy per token: logits ``[..., V]``, labels ``[...]`` with -100 where nothing counts."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return mean_of(losses, labels.flatten() != IGNORE)


class TokenOutputs(NamedTuple):
    """A text run in words: the logits before each of its tokens ``[B, A, V]``, the states at them ``[B, A, d]``."""

    logits: Tensor
    states: Tensor
    layers: tuple[Tensor, ...]
    """Every layer's, the embeddings first, ``[B, A, d]`` each; empty where nobody asked."""


class Rollout:
    """The prompt run once, and the loop over its cache; the rest on demand.

    Args:
        reasoner: the model, in training mode.
        batch: from :class:`slr_core.training.data.Collator`.
        config: the recipe.
        teacher: the larger latent reasoner of the objectives ``teacher_*``.
        bridge: maps the reasoner's states to the teacher's width.

    Attributes:
        prompt: the context before the loop.
        start: ``[B, d]``, the state from which an un-looped model reads the first token.
        workspace: ``[B, T + 1, W, d]``, h_0 first.
        own: ``[B, W]`` bool, the real positions of the workspace.
        states: ``[B, T + 1, d]``, those at the last own position.
        blind: leading iterations that no gradient reaches. They teach nothing, and would only thin out the means.
    """

    def __init__(
        self,
        reasoner: LatentReasoner,
        batch: dict[str, Any],
        config: TrainConfig,
        teacher: LatentReasoner | None = None,
        bridge: nn.Module | None = None,
    ) -> None:
        self.reasoner, self.batch, self.config, self.teacher, self.bridge = reasoner, batch, config, teacher, bridge
        plan: LoopPlan = batch["plan"]
        self.plan, self.iterations, self.exits = plan, plan.iterations, batch["exits"]
        terms = config.objectives
        context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        self.prompt = context.fork()
        if terms.codi or terms.text:
            context.passes = []
        self.workspace = reasoner.unroll(context, plan.iterations, plan.backprop)
        self.valid_mask = context.valid_mask
        self.states = readout(self.workspace, context.valid_mask)
        self.blind = 0 if plan.backprop is None else max(0, plan.iterations - plan.backprop)
        if plan.iterations == 0:
            reasoner.close(context, self.workspace, torch.zeros_like(self.exits))
        self.start = context.state
        self._context = context

    @cached_property
    def closed(self) -> Context:
        """Ready to write after each row's exit; to be forked by whoever writes."""
        if self.iterations:
            self.reasoner.close(self._context, self.workspace, self.exits)
        return self._context

    @cached_property
    def answer_logits(self) -> Tensor:
        """Logits ``[B, A, V]`` before each token of ``answer_ids``, teacher-forced, written after the loop."""
        if self.reasoner.answers_from_states and self.iterations:
            return self._from_states()
        return teacher_force(self.reasoner, self.closed.fork(), self.batch["answer_ids"], looped=self.exits > 0).logits

    def _from_states(self) -> Tensor:
        memory, present = (
            self.workspace[torch.arange(len(self.exits), device=self.exits.device), self.exits],
            self.valid_mask,
        )
        if self.reasoner.config.loop.workspace == "append":
            memory = self.states[:, 1:]
            order = torch.arange(self.iterations, device=memory.device)
            present = order < self.exits.clamp_min(1)[:, None]
        return self.reasoner.decode_latent(memory, present, self.batch["answer_ids"][:, :-1].clamp_min(0))

    @cached_property
    def in_words(self) -> TokenOutputs:
        """The chain of thought and the answer written by the un-looped model, over the same cached prompt."""
        context = self.prompt.fork()
        context.passes = []
        return teacher_force(self.reasoner, context, self.batch["cot_ids"])

    @cached_property
    def taught(self) -> Rollout:
        """The teacher on the same batch, without gradients."""
        assert self.teacher is not None
        with torch.no_grad():
            return Rollout(self.teacher, self.batch, self.config)

    def at_step_ends(self, steps: int) -> tuple[Tensor, Tensor]:
        """The states that end each step: ``[B, K, d]``, and which of them the loop has with a gradient, ``[B, K]``.

        Workspace ``append``: thought c·k; ``block``: position c·k of the last iteration.
        """
        states, first = self.by_position()
        places = torch.arange(1, steps + 1, device=states.device) * self.config.thoughts_per_step - 1
        there = (places < states.shape[1]) & (places >= first)
        picked = states[:, places.clamp_max(max(0, states.shape[1] - 1))]
        return picked, self.batch["in_loop"] & there

    def by_position(self) -> tuple[Tensor, int]:
        """States in the order of the chain ``[B, P, d]``: thoughts, or a block's positions; and the first to count."""
        if self.reasoner.config.loop.workspace == "append":
            return self.states[:, 1:], self.blind
        return self.workspace[:, -1], 0


def teacher_force(
    reasoner: LatentReasoner, context: Context, ids: Tensor, looped: Tensor | None = None
) -> TokenOutputs:
    """Feed ``ids`` ``[B, A]`` (padded with -100) after ``context``, which gains their columns.

    Args:
        reasoner: the model.
        context: the first token is read at its state.
        ids: teacher-forced.
        looped: ``[B]`` bool, rows after a loop; ``None``: none of them.
    """
    if looped is None:
        looped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    states = reasoner.forward_after_loop(context, reasoner.embed(ids.clamp_min(0)), ids != IGNORE, looped)
    before = torch.cat([context.state[:, None], states[:, :-1]], dim=1)
    return TokenOutputs(reasoner.head(before), states, context.passes[-1] if context.passes else ())
