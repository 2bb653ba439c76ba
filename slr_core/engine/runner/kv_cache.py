"""The key/value cache: allocated once, a slot a request, read without copying where the slots are neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from slr_core.errors import ConfigError


class KVCache(Cache):
    """Keys and values of every slot, in one tensor ``[layers, 2, slots, heads, capacity + 1, head_dim]``.

    The last column takes what padding writes; nobody attends to it.

    Args:
        base: whose shapes, dtype and device to follow.
        slots: requests at once.
        capacity: columns of a slot.

    Raises:
        ConfigError: the base's layers differ in shape.
    """

    def __init__(self, base: PreTrainedModel, slots: int, capacity: int) -> None:
        layers, heads, head_dim = shape(base)
        self.slots, self.capacity = slots, capacity
        # Zeros, and not whatever memory holds: a masked NaN still poisons attention (0 * NaN is NaN).
        self.store = torch.zeros(layers, 2, slots, heads, capacity + 1, head_dim, dtype=base.dtype, device=base.device)
        super().__init__(layers=[KVCacheLayer(self, index) for index in range(layers)])
        self.rows: Tensor = torch.empty(0)
        self.columns: Tensor = torch.empty(0)
        self.width = 0
        self.read: slice | Tensor = slice(0, 0)

    def bind(self, slots: Sequence[int], columns: Tensor, width: int, *, whole: bool = False) -> None:
        """Say where the next pass writes and what it reads.

        Args:
            slots: of its rows, ascending; with ``whole`` in any order, and one may come several times.
            columns: ``[n, q]`` long, where each input goes; ``capacity`` for padding.
            width: columns to read, from the first.
            whole: all slots are read, whoever writes.
        """
        self.columns, self.width = columns, width
        self.rows = torch.tensor(slots, device=columns.device)
        neighbours = slots[-1] - slots[0] + 1 == len(slots)
        self.read = slice(None) if whole else slice(slots[0], slots[-1] + 1) if neighbours else self.rows

    def move(self, source: int, target: int, columns: int) -> None:
        """Copy the first columns of a slot to another."""
        self.store[:, :, target, :, :columns] = self.store[:, :, source, :, :columns]

    def take(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of columns ``start`` to ``end``: ``[layers, 2, heads, end - start, head_dim]``."""
        return self.store[:, :, slot, :, start:end].clone()

    def put(self, slot: int, start: int, block: Tensor) -> None:
        """Write what :meth:`take` returned."""
        self.store[:, :, slot, :, start : start + block.shape[-2]] = block

    def wipe(self, slot: int, start: int, end: int) -> None:
        """Forget columns ``start`` to ``end``: a state that is not finite would poison whoever comes next."""
        self.store[:, :, slot, :, start:end] = 0


class KVCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the slots, as ``transformers`` asks for it."""

    is_sliding = False

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.keys, self.values = cache.store[index, 0], cache.store[index, 1]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[n, heads, q, head_dim]`` and return what these rows may read: ``[n, heads, width, head_dim]``."""
        cache, keys, values = self.cache, self.keys, self.values
        assert keys is not None
        assert values is not None
        rows = cache.rows[:, None]
        keys[rows, :, cache.columns] = key_states.transpose(1, 2)
        values[rows, :, cache.columns] = value_states.transpose(1, 2)
        return keys[:, :, : cache.width][cache.read], values[:, :, : cache.width][cache.read]

    def get_seq_length(self) -> int:
        """Columns that a pass reads; positions are given to the model, never derived from this."""
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of a mask; masks are given to the model as well."""
        return self.cache.width, 0

    def get_max_length(self) -> int:
        """Columns of a slot."""
        return self.cache.capacity


def shape(base: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, key/value heads and head width of a base model.

    Raises:
        ConfigError: its layers differ in shape.
    """
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not isinstance(heads, int):
        raise ConfigError(f"{type(base).__name__}: layers of different shape are not supported")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


def position_bytes(base: PreTrainedModel) -> int:
    """Memory of one position of a slot, in bytes."""
    layers, heads, head_dim = shape(base)
    return 2 * layers * heads * head_dim * base.dtype.itemsize
