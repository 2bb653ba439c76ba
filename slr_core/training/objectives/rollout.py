"""One batch run through the loop: the input of all objectives."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slr_core.loop.context import Context
from slr_core.loop.token_workspace import Token
from slr_core.loop.workspace import readout
from slr_core.reasoner import LatentReasoner
from slr_core.training.config import TrainConfig
from slr_core.training.data import IGNORE, LoopPlan
from slr_core.training.last_layer import last_positions_alone
from slr_core.training.objectives.token_loss import Mean, state_loss
from slr_core.training.split_cache import is_split, split


def mean_over_exits(reasoner: LatentReasoner, states: Tensor, labels: Tensor) -> Mean:
    """Cross-entropy per token and iteration, in the workspace ``token``.

    Args:
        reasoner: its head reads the states.
        states: ``[B, T, A, d]``, before each token.
        labels: ``[B, A]``, where -100 is ignored.
    """
    # One iteration at a time: logits are larger than states.
    terms = [state_loss(reasoner, states[:, t], labels) for t in range(states.shape[1])]
    return Mean(torch.stack([x.total for x in terms]).sum(), torch.stack([x.divisor for x in terms]).sum())


class TokenOutputs(NamedTuple):
    """A teacher-forced text: the last hidden states before each token, and at each, ``[B, A, d]``."""

    before: Tensor
    states: Tensor
    layers: tuple[Tensor, ...]
    """States of the embeddings and of every layer, ``[B, A, d]`` each; empty unless recorded."""


class Rollout:
    """The prompt and the loop of a batch; other passes run when an objective first reads them.

    Args:
        reasoner: the model, in training mode.
        batch: from :class:`slr_core.training.data.Collator`.
        config: the recipe.
        teacher: the teacher of the objectives ``teacher_*``.
        bridge: projection from the reasoner's hidden size to the teacher's.

    Attributes:
        prompt: the context before the loop.
        start: ``[B, d]``, the state from which an un-looped model reads the first token.
        workspace: ``[B, T + 1, W, d]``, h_0 first.
        valid_mask: ``[B, W]`` bool, the positions of the workspace that are not padding.
        states: ``[B, T + 1, d]``, the states at the last valid position.
        detached: number of leading iterations without gradients. Objectives leave them out.
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
        with ExitStack() as stack:
            if reasoner.workspace.prefills:
                stack.enter_context(last_positions_alone(reasoner.base, batch["attention_mask"].bool()))
            context = reasoner.encode(batch["input_ids"], batch["attention_mask"])
        if reasoner.workspace.prefills and is_split(reasoner.base):
            split(context)
        self.prompt = context.fork()
        if terms.codi or terms.text:
            context.passes = []
        self.workspace = reasoner.unroll(context, plan.iterations, plan.backprop)
        self.valid_mask = context.valid_mask
        self.states = readout(self.workspace, context.valid_mask)
        self.detached = 0 if plan.backprop is None else max(0, plan.iterations - plan.backprop)
        if plan.iterations == 0:
            reasoner.close(context, self.workspace, torch.zeros_like(self.exits))
        self.start = context.state
        self._context = context

    @cached_property
    def closed_context(self) -> Context:
        """The context after each row's exit and closing pass. Fork it before you feed tokens."""
        if self.iterations:
            self.reasoner.close(self._context, self.workspace, self.exits)
        return self._context

    @cached_property
    def states_per_token(self) -> Tensor:
        """In the workspace ``token``: states ``[B, T, A, d]`` before each token of ``answer_ids``, by iteration."""
        workspace, context = self.reasoner.workspace, self._context
        assert isinstance(workspace, Token)
        ids = self.batch["answer_ids"]
        self.reasoner.close(context, self.workspace, torch.full_like(self.exits, self.iterations))
        workspace.extend(context, self.reasoner.embed(ids.clamp_min(0)), ids != IGNORE)
        states = self.reasoner.unroll(context, self.iterations, self.plan.backprop)
        return torch.cat([self.states[:, 1:, None], states[:, 1:, :-1]], dim=2)

    @cached_property
    def answer_logits(self) -> Tensor:
        """Logits ``[B, A, V]`` before each token of ``answer_ids``, teacher-forced after the loop.

        In the workspace ``token``, those of the last iteration.
        """
        if self.reasoner.workspace.per_token and self.iterations:
            return self.reasoner.head(self.states_per_token[:, -1])
        if self.reasoner.answers_from_states and self.iterations:
            return self._from_states()
        return self.reasoner.head(self.answer_states)

    @cached_property
    def answer_states(self) -> Tensor:
        """States ``[B, A, d]`` before each token of ``answer_ids``, teacher-forced after the loop."""
        context, ids = self.closed_context.fork(), self.batch["answer_ids"]
        return teacher_force(self.reasoner, context, ids, looped=self.exits > 0).before

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
    def chain_outputs(self) -> TokenOutputs:
        """Chain of thought and answer, teacher-forced in the un-looped model over the same cached prompt."""
        context = self.prompt.fork()
        context.passes = []
        return teacher_force(self.reasoner, context, self.batch["cot_ids"])

    @cached_property
    def teacher_rollout(self) -> Rollout:
        """The teacher on the same batch, without gradients. A teacher whose loop is not trained runs without it."""
        assert self.teacher is not None
        batch = self.batch
        if not self.teacher.config.trained:
            batch = {**batch, "plan": LoopPlan(0), "exits": torch.zeros_like(self.exits)}
        with torch.no_grad():
            return Rollout(self.teacher, batch, self.config)

    def at_step_ends(self, steps: int) -> tuple[Tensor, Tensor]:
        """The states that end each step ``[B, K, d]``, and a mask ``[B, K]``: those that exist and have a gradient.

        Workspace ``append``: thought c·k; ``block``: position c·k of the last iteration.
        """
        states, first = self.states_by_position()
        places = torch.arange(1, steps + 1, device=states.device) * self.config.thoughts_per_step - 1
        available = (places < states.shape[1]) & (places >= first)
        picked = states[:, places.clamp_max(max(0, states.shape[1] - 1))]
        return picked, self.batch["in_loop"] & available

    def states_by_position(self) -> tuple[Tensor, int]:
        """States ``[B, P, d]`` in the chain's order (thoughts, or a block's positions); the first with a gradient."""
        if self.reasoner.config.loop.workspace == "append":
            return self.states[:, 1:], self.detached
        return self.workspace[:, -1], 0


def teacher_force(
    reasoner: LatentReasoner, context: Context, ids: Tensor, looped: Tensor | None = None
) -> TokenOutputs:
    """Feed ``ids`` after ``context``, whose cache gains their positions.

    Args:
        reasoner: the model.
        context: the first token is read at its state.
        ids: ``[B, A]``, padded with -100.
        looped: ``[B]`` bool, rows that have looped; ``None``: none.
    """
    if looped is None:
        looped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    states = reasoner.forward_after_loop(context, reasoner.embed(ids.clamp_min(0)), ids != IGNORE, looped)
    before = torch.cat([context.state[:, None], states[:, :-1]], dim=1)
    return TokenOutputs(before, states, context.passes[-1] if context.passes else ())
