"""What a batch has run so far, as the reference sees it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Context:
    """What a batch has run so far: one cache column per input, and which of them each row may attend to.

    Attributes:
        cache: keys and values of all columns, ``[B, heads, S, head_dim]`` per layer.
        visible: ``[B, S]`` bool; padding and abandoned thoughts are invisible.
        next_position: ``[B]`` long, the position id of each row's next input.
        hidden: ``[B, d]``, the state from which each row goes on; after the prompt, h_0.
    """

    cache: DynamicCache
    visible: Tensor
    next_position: Tensor
    hidden: Tensor

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
        return Context(cache, self.visible, self.next_position, self.hidden)
