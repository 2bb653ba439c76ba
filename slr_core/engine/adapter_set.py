"""A loop adapter set: what a checkpoint adds to its base model, for rows at different iterations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self
from uuid import uuid4

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slr_core.engine.runner.linear import share_linears
from slr_core.engine.runner.lora_batch import check_finite
from slr_core.errors import ConfigError
from slr_core.loop.lora import DECODE, trained_index
from slr_core.reasoner import LatentReasoner
from slr_core.types import Request


class LoopAdapterSet:
    """A loop's modules and its adapters in the :class:`LoraBatch`.

    The formulas are those of :class:`slr_core.model.looped.LoopedModel`, with a timestep for each row.

    Args:
        name: the name by which requests choose it.
        reasoner: its modules, texts and defaults are used; its base model is not run.

    Attributes:
        adapter_ids: ids of its adapters in the LoraBatch, by name; set by :class:`LoopAdapterSets`.
        prefix_salt: begins the keys of its prefixes in the prefix cache; empty if prefill runs the base model alone.
        timesteps: e_1 ... e_T ``[T, d]``; ``None``: the loop has no timestep embedding.
    """

    def __init__(self, name: str, reasoner: LatentReasoner) -> None:
        self.name, self.reasoner = name, reasoner
        self.adapter_ids: dict[str, int] = {}
        # Prefixes that an adapter of this set has run are of no use to another set, nor to a later one of this name.
        covers_prompt = reasoner.adapters.default is not None or reasoner.workspace.per_token
        self.prefix_salt = uuid4().bytes if covers_prompt else b""
        self._adapter_names: dict[int, str | None] = {}
        self.config = reasoner.config.loop
        self.workspace = reasoner.workspace
        timestep, trained = reasoner.timestep, self.config.trained_iterations
        with torch.inference_mode():
            self.timesteps = (
                torch.stack([timestep.embedding(t) for t in range(1, trained + 1)]) if timestep.kind != "none" else None
            )

    @classmethod
    def load(cls, owner: LatentReasoner, name: str, path_or_id: str) -> Self:
        """Load a checkpoint's loop onto the base model of ``owner``.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: its base model is another one, or its weights are not finite.
        """
        # On the CPU: the owner's device may have no room for a second base model.
        reasoner = LatentReasoner.from_pretrained(path_or_id, dtype=owner.base.dtype, device="cpu")
        share_base(owner, reasoner)
        reasoner.to(owner.device)
        check_finite(reasoner.base)
        return cls(name, reasoner)

    @property
    def in_place(self) -> bool:
        """Whether every iteration runs the same positions: in all workspaces but ``append``."""
        return not self.workspace.starts_from_state

    @property
    def raw(self) -> bool:
        """Whether its states are those before the final norm."""
        return self.reasoner.final_norm is not None

    def adapter_name(self, t: int) -> str | None:
        """As :meth:`LatentReasoner.adapter_name`, cached."""
        if t not in self._adapter_names:
            self._adapter_names[t] = self.reasoner.adapter_name(t)
        return self._adapter_names[t]

    def adapter_id(self, t: int) -> int | None:
        """The adapter of iteration ``t`` in the LoraBatch; ``None``: the base model alone."""
        name = self.adapter_name(t)
        return None if name is None else self.adapter_ids[name]

    @property
    def default_adapter_id(self) -> int | None:
        """The adapter of passes over the prompt, and of an answer without a loop; ``None``: the base model alone."""
        default = self.reasoner.adapters.default
        return None if default is None else self.adapter_ids[default]

    @property
    def decode_adapter_id(self) -> int | None:
        """The adapter of passes after a loop; ``None``: the base model alone."""
        return self.adapter_ids.get(DECODE, self.default_adapter_id)

    def reserved_positions(self, request: Request) -> int:
        """Cache positions that a request needs at most."""
        iterations = request.loop.max_iterations
        return self.workspace.cache_copies(iterations) * (
            len(request.prompt_ids)
            + self.workspace.loop_positions(iterations)
            + len(request.answer_prefix_ids)
            + len(request.forced_ids)
            + request.max_new_tokens
        )

    def inputs(
        self,
        hidden: Tensor,
        prompt_states: Tensor | None,
        iterations: Sequence[int],
        last_changes: Sequence[float | None],
        heads: Sequence[Tensor | None],
    ) -> Tensor:
        """``u_t`` ``[n, W, d]`` of one iteration of each row.

        Args:
            hidden: h_{t-1} ``[n, W, d]``.
            prompt_states: as in :meth:`LatentReasoner.feed_back`, ``[n, d]``.
            iterations: each row's ``t``.
            last_changes: each row's last relative change.
            heads: each row's log-probabilities ``[V]`` at h_{t-1}, where the LM head has been read there.
        """
        timestep, projected = self.reasoner.timestep, self._feed_back(hidden, prompt_states, heads)
        if self.reasoner.shifted:
            first = torch.tensor([t == 1 for t in iterations], device=hidden.device)
            projected = torch.where(first[:, None, None], hidden, projected)
        if not timestep.acts:
            return projected
        device = hidden.device
        e_t = None
        if self.timesteps is not None:
            loop = self.config
            index = [trained_index(t, loop.trained_iterations, loop.lora.past_end) - 1 for t in iterations]
            e_t = self.timesteps[torch.tensor(index, device=device)][:, None]
        changes = None
        if timestep.noise_level:
            changes = torch.tensor([torch.nan if x is None else x for x in last_changes], device=device)[:, None]
        return timestep.combined(projected, e_t, changes)

    def _feed_back(self, hidden: Tensor, prompt_states: Tensor | None, heads: Sequence[Tensor | None]) -> Tensor:
        """As :meth:`LatentReasoner.feed_back`; the LM head is not read again where it has been."""
        projection, known = self.config.projection, [head for head in heads if head is not None]
        if projection.kind != "expected_embedding" or self.in_place or len(known) < len(heads):
            return self.reasoner.feed_back(hidden, prompt_states)
        return self.reasoner.expected_embedding(torch.stack(known), projection.top_tokens)[:, None].to(hidden.dtype)


def number_adapters(
    sets: Iterable[LoopAdapterSet],
) -> tuple[list[tuple[PreTrainedModel, str]], dict[LoopAdapterSet, dict[str, int]]]:
    """Number the adapters of loop adapter sets.

    Returns:
        The model and the name of each adapter, by id; and the ids of each set's adapters, by name.
    """
    adapters: list[tuple[PreTrainedModel, str]] = []
    ids: dict[LoopAdapterSet, dict[str, int]] = {}
    for adapter_set in sets:
        names = sorted(adapter_set.reasoner.adapters.names)
        ids[adapter_set] = {name: len(adapters) + i for i, name in enumerate(names)}
        adapters += [(adapter_set.reasoner.base, name) for name in names]
    return adapters, ids


def share_base(owner: LatentReasoner, other: LatentReasoner) -> None:
    """Make ``other`` use the base weights of ``owner``, and free its own.

    Raises:
        ConfigError: the weights differ.
    """
    share_linears(owner.base, other.base)
    ours, theirs = _base_weights(owner), _base_weights(other)
    if ours.keys() != theirs.keys() or not all(_equal(ours[name], theirs[name]) for name in ours):
        raise ConfigError("the checkpoint's base model is not the one that is served")
    for name, weight in theirs.items():
        if weight is not ours[name]:
            weight.data = ours[name].data


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    same_kind = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same_kind and torch.equal(first.to(second.device), second)


def _base_weights(reasoner: LatentReasoner) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in reasoner.base.named_parameters()
        if ".lora_" not in name
    }
