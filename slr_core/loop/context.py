"""The state of a batch in the reference."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Context:
    """The state of a batch of B rows: a key/value cache with S positions, and the workspace with W positions.

    Attributes:
        cache: keys and values, ``[B, heads, S, head_dim]`` per layer.
        visible: ``[B, S]`` bool; padding and dropped thoughts are invisible.
        next_position: ``[B]`` long, the position id of each row's next input.
        state: ``[B, d]``, the state from which the next token is read.
        initial: h_0 ``[B, W, d]``.
        hidden: h_t ``[B, W, d]``.
        valid_mask: ``[B, W]`` bool; the other workspace positions are padding.
        change: ``[B]`` fp32, the last relative change, NaN where there is none yet; updated only if the timestep
            embedding uses it.
        passes: set it to a list to record the hidden states ``[B, q, d]`` of all layers of every pass, forks included:
            embeddings first, the final norm's output last. ``None``: they are not recorded.
        depths: ``[B]`` long, in the workspace ``token``: iterations that each position of the answer may run; ``None``:
            the prompt is still being looped.
        caches: in the workspace ``token``: the cache of each iteration, of which ``cache`` and ``visible`` are used;
            a single one if all iterations share it.
        runs: in the workspace ``token``: the cache of each iteration with the positions that are being looped.
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
    depths: Tensor | None = None
    caches: list[Context] = field(default_factory=list)
    runs: list[Context] = field(default_factory=list)

    def layers(self) -> Iterator[tuple[DynamicLayer, Tensor, Tensor]]:
        """The cache's layers with their keys and values, ``[B, heads, S, head_dim]`` each."""
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            yield layer, layer.keys, layer.values

    def fork(self) -> Context:
        """A second context over the same cache. No tensor is copied: a layer grows by replacing its tensors."""
        cache = DynamicCache()
        cache.layers = [copy(layer) for layer in self.cache.layers]
        return replace(self, cache=cache)

    def restore_gradients(self, before: Context) -> None:
        """Replace the first cache positions by those of ``before``, the context from which this one grew."""
        for (layer, keys, values), (_, earlier_keys, earlier_values) in zip(
            self.layers(), before.layers(), strict=True
        ):
            positions = earlier_keys.shape[-2]
            layer.keys = torch.cat([earlier_keys, keys[..., positions:, :]], dim=-2)
            layer.values = torch.cat([earlier_values, values[..., positions:, :]], dim=-2)
