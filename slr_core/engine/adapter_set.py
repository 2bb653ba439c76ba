"""A loop set: what a checkpoint adds to its base model, over rows that are at different iterations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slr_core.engine.runner.lora_batch import check_finite
from slr_core.errors import ConfigError
from slr_core.loop.lora import DECODE, trained_index
from slr_core.model.reasoner import LatentReasoner
from slr_core.types import Request


class LoopAdapterSet:
    """The loop's own modules and the places of its adapters in the bank.

    The formulas are those of :class:`slr_core.model.reasoner.LatentReasoner`, with a timestep for each row.

    Args:
        name: by which requests ask for it.
        reasoner: whose modules, texts and defaults it has; its base model is not run.

    Attributes:
        adapters: place in the bank of each adapter, by name; kept up by whoever fills the bank.
    """

    def __init__(self, name: str, reasoner: LatentReasoner) -> None:
        self.name, self.reasoner = name, reasoner
        self.adapters: dict[str, int] = {}
        self._names: dict[int, str | None] = {}
        self.config = reasoner.config.loop
        self.workspace = reasoner.workspace
        timestep, trained = reasoner.timestep, self.config.trained_iterations
        with torch.inference_mode():
            self.moments = (
                torch.stack([timestep.embedding(t) for t in range(1, trained + 1)]) if timestep.kind != "none" else None
            )
        """e_1 ... e_T ``[T, d]``."""

    @classmethod
    def beside(cls, owner: LatentReasoner, name: str, path_or_id: str) -> Self:
        """Load a checkpoint's loop around the base model that ``owner`` has already.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: its base model is another, or its weights are not finite.
        """
        # Not on the owner's device: there is no room for a second base model on it.
        reasoner = LatentReasoner.from_pretrained(path_or_id, dtype=owner.base.dtype, device="cpu")
        share_base(owner, reasoner)
        reasoner.to(owner.device)
        check_finite(reasoner.base)
        return cls(name, reasoner)

    @property
    def in_place(self) -> bool:
        """Whether an iteration runs the same positions again: every workspace but ``append``."""
        return not self.workspace.starts_from_state

    def adapter_name(self, t: int) -> str | None:
        """As :meth:`LatentReasoner.adapter_name`."""
        if t not in self._names:
            self._names[t] = self.reasoner.adapter_name(t)
        return self._names[t]

    def adapter(self, t: int) -> int | None:
        """Place in the bank of iteration ``t``'s adapter."""
        name = self.adapter_name(t)
        return None if name is None else self.adapters[name]

    @property
    def decode_adapter(self) -> int | None:
        """Place in the bank of what writes after a loop."""
        return self.adapters.get(DECODE)

    def positions(self, request: Request) -> int:
        """Columns of a slot that a request may come to need."""
        return (
            len(request.prompt_ids)
            + self.workspace.loop_positions(request.loop.max_iterations)
            + len(request.answer_prefix_ids)
            + len(request.forced_ids)
            + request.max_new_tokens
        )

    def inputs(self, hidden: Tensor, iterations: Sequence[int], change: Sequence[float | None]) -> Tensor:
        """``u_t`` ``[n, W, d]`` from h_{t-1} ``[n, W, d]``, each row's ``t`` and its last relative change."""
        timestep, projected = self.reasoner.timestep, self.reasoner.project_in(hidden)
        if not timestep.acts:
            return projected
        device = hidden.device
        e_t = None
        if self.moments is not None:
            loop = self.config
            index = [trained_index(t, loop.trained_iterations, loop.lora.past_end) - 1 for t in iterations]
            e_t = self.moments[torch.tensor(index, device=device)][:, None]
        last = None
        if timestep.noise_level:
            last = torch.tensor([torch.nan if x is None else x for x in change], device=device)[:, None]
        return timestep.combined(projected, e_t, last)


def placed(
    sets: Iterable[LoopAdapterSet],
) -> tuple[list[tuple[PreTrainedModel, str]], dict[LoopAdapterSet, dict[str, int]]]:
    """Where to find each adapter of these loop sets, and its name, in the order of their places; then these places."""
    adapters: list[tuple[PreTrainedModel, str]] = []
    places: dict[LoopAdapterSet, dict[str, int]] = {}
    for loops in sets:
        names = sorted(loops.reasoner.adapters.names)
        places[loops] = {name: len(adapters) + i for i, name in enumerate(names)}
        adapters += [(loops.reasoner.base, name) for name in names]
    return adapters, places


def share_base(owner: LatentReasoner, other: LatentReasoner) -> None:
    """Let ``other`` use the base weights of ``owner``, and forget its own.

    Raises:
        ConfigError: they are not the same weights.
    """
    ours, theirs = _base_weights(owner), _base_weights(other)
    if ours.keys() != theirs.keys() or not all(_same(ours[name], theirs[name]) for name in ours):
        raise ConfigError("the checkpoint's base model is not the one that is served")
    for name, weight in theirs.items():
        weight.data = ours[name].data


def _same(first: Tensor, second: Tensor) -> bool:
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and torch.equal(first.to(second.device), second)


def _base_weights(reasoner: LatentReasoner) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in reasoner.base.named_parameters()
        if ".lora_" not in name
    }
