"""What a batch has run so far, and what its loop came to, as the reference sees it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from slr_core.types import ExitReason, IterationRecord, Stability


@dataclass
class Context:
    """What a batch of B rows has run so far: one cache column per input, and the workspace that its loop refines.

    Attributes:
        cache: keys and values of all S columns, ``[B, heads, S, head_dim]`` per layer.
        visible: ``[B, S]`` bool; padding and abandoned thoughts are invisible.
        next_position: ``[B]`` long, the position id of each row's next input.
        state: ``[B, d]``, the state from which the next token is read.
        initial: h_0 ``[B, W, d]``, W the positions of the workspace.
        hidden: h_t ``[B, W, d]``.
        own: ``[B, W]`` bool, the positions that are a row's own; the others are padding.
        change: ``[B]`` fp32, the last relative change, NaN where there is none yet; kept where the timestep
            embedding reads it.
        passes: the hidden states of every layer ``[B, q, d]``, embeddings first and the final norm's last, of each
            pass since this was set to a list, forks' included; ``None``: nobody asked.
    """

    cache: DynamicCache
    visible: Tensor
    next_position: Tensor
    state: Tensor
    initial: Tensor
    hidden: Tensor
    valid_mask: Tensor
    change: Tensor
    passes: list[tuple[Tensor, ...]] | None = None

    def layers(self) -> Iterator[tuple[DynamicLayer, Tensor, Tensor]]:
        """The cache's layers with their keys and values."""
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            yield layer, layer.keys, layer.values

    def fork(self) -> Context:
        """A second context over what has run so far. A layer grows by replacing its tensors: none is copied."""
        cache = DynamicCache()
        cache.layers = [copy(layer) for layer, _, _ in self.layers()]
        return replace(self, cache=cache)

    def regain_gradients(self, before: Context) -> None:
        """Put the columns of ``before``, which this context grew from, back in place as they were then."""
        for (layer, keys, values), (_, earlier_keys, earlier_values) in zip(
            self.layers(), before.layers(), strict=True
        ):
            columns = earlier_keys.shape[-2]
            layer.keys = torch.cat([earlier_keys, keys[..., columns:, :]], dim=-2)
            layer.values = torch.cat([earlier_values, values[..., columns:, :]], dim=-2)


@dataclass
class LoopOutput:
    """A finished loop, row by row.

    Attributes:
        context: ready to write the answer: each row sees what its own loop left, and nothing else.
        states: h_0 ... h_t of each row, ``[t + 1, W, d]`` each, t the iterations that the row ran, W the
            workspace positions that are its own.
        iterations: iterations run.
        kept: iterations whose thoughts stay visible; below ``iterations`` only after a divergence.
        exit_reasons: why each row stopped.
        records: one per iteration and row.
        stability: summary per row.
        durations_s: seconds from the loop's start to the row's exit.
    """

    context: Context
    states: list[Tensor]
    iterations: list[int]
    kept_iterations: list[int]
    exit_reasons: list[ExitReason]
    records: list[list[IterationRecord]]
    stability: list[Stability]
    durations_s: list[float]
