"""The key/value cache: allocated once, one slot per request. Neighbouring slots are read without a copy.

On a CPU its memory is reserved at first, and used as positions are written.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from slr_core.errors import ConfigError


class KVCache(Cache):
    """Keys and values of all slots, in one tensor ``[layers, 2, slots, heads, capacity + 1, head_dim]``.

    The last position is scratch space: padding writes to it, and nothing attends to it.

    Args:
        base: the model whose shapes, dtype and device the cache has.
        slots: number of slots.
        capacity: positions of a slot.

    Raises:
        ConfigError: the model's layers differ in shape.
    """

    def __init__(self, base: PreTrainedModel, slots: int, capacity: int) -> None:
        layers, heads, head_dim = cache_shape(base)
        self.slots, self.capacity = slots, capacity
        # Zeros: uninitialized memory may hold NaN, and a masked NaN still spoils attention (0 * NaN is NaN).
        shape = layers, 2, slots, heads, capacity + 1, head_dim
        self._pages = _reserve(prod(shape) * base.dtype.itemsize) if base.device.type == "cpu" else None
        if self._pages is None:
            self.store = torch.zeros(shape, dtype=base.dtype, device=base.device)
        else:
            self.store = torch.frombuffer(self._pages, dtype=base.dtype).view(shape)
        super().__init__(layers=[KVCacheLayer(self, index) for index in range(layers)])
        self.row_slots: Tensor = torch.empty(0)
        self.positions: Tensor = torch.empty(0)
        self.first = self.width = 0
        self.read_slots: slice | Tensor = slice(0, 0)

    def bind(
        self, slots: Sequence[int], positions: Tensor, width: int, *, first: int = 0, read_all: bool = False
    ) -> None:
        """Set where the next pass writes and what it reads.

        Args:
            slots: the slot of each row, in ascending order; with ``read_all`` in any order, also repeatedly.
            positions: ``[n, q]`` long, where each input is written; ``capacity`` for padding.
            width: end of the positions to read.
            first: the first position to read.
            read_all: read all slots, not only those of the rows.
        """
        self.positions, self.first, self.width = positions, first, width
        self.row_slots = torch.tensor(slots, device=positions.device)
        if read_all:
            self.read_slots = slice(None)
        elif slots[-1] - slots[0] + 1 == len(slots):
            self.read_slots = slice(slots[0], slots[-1] + 1)
        else:
            self.read_slots = self.row_slots

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy the first ``positions`` positions of a slot to another slot."""
        self.store[:, :, target, :, :positions] = self.store[:, :, source, :, :positions]

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of positions ``start`` to ``end``: ``[layers, 2, heads, end - start, head_dim]``."""
        return self.store[:, :, slot, :, start:end].clone()

    def write(self, slot: int, start: int, keys_values: Tensor) -> None:
        """Write what :meth:`read` returned."""
        self.store[:, :, slot, :, start : start + keys_values.shape[-2]] = keys_values

    def spread(self, slot: int, source: int, targets: range) -> None:
        """Copy one position of a slot to others."""
        if targets:
            kept = self.store[:, :, slot, :, source : source + 1]
            self.store[:, :, slot, :, targets.start : targets.stop : targets.step] = kept

    def clear(self, slot: int, start: int, end: int) -> None:
        """Zero positions ``start`` to ``end``: values that are not finite would spoil the next request's attention."""
        self.store[:, :, slot, :, start:end] = 0

    def reset(self) -> None:
        """Zero all positions and, on Linux, return their memory to the operating system."""
        if self._pages is not None and sys.platform == "linux":  # elsewhere, the values may survive
            self._pages.madvise(mmap.MADV_DONTNEED)
        else:
            self.store.zero_()


class CacheCopies:
    """Several key/value caches in each slot, one after another.

    Args:
        cache: the slots.
        copies: number of key/value caches.
        size: positions of each.
    """

    def __init__(self, cache: KVCache, copies: int, size: int) -> None:
        self.cache, self.copies, self.size = cache, copies, size

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of positions ``start`` to ``end`` of all: ``[copies, layers, 2, heads, end - start, head_dim]``."""
        return torch.stack([self.cache.read(slot, at + start, at + end) for at in self._starts()])

    def write(self, slot: int, start: int, keys_values: Tensor) -> None:
        """Write what :meth:`read` returned."""
        for at, part in zip(self._starts(), keys_values, strict=True):
            self.cache.write(slot, at + start, part)

    def _starts(self) -> range:
        return range(0, self.copies * self.size, self.size)


class KVCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache, with the interface of ``transformers``."""

    is_sliding = False

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.keys, self.values = cache.store[index, 0], cache.store[index, 1]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the cache is allocated already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[n, heads, q, head_dim]`` and return the keys and values to read, of the same shape but for q."""
        cache, keys, values = self.cache, self.keys, self.values
        assert keys is not None
        assert values is not None
        row_slots = cache.row_slots[:, None]
        keys[row_slots, :, cache.positions] = key_states.transpose(1, 2)
        values[row_slots, :, cache.positions] = value_states.transpose(1, 2)
        read = slice(cache.first, cache.width)
        return keys[:, :, read][cache.read_slots], values[:, :, read][cache.read_slots]

    def get_seq_length(self) -> int:
        """Positions that a pass reads. Position ids are always passed to the model, never derived from this."""
        return self.cache.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of an attention mask. Masks, too, are always passed to the model."""
        return self.cache.width, 0

    def get_max_length(self) -> int:
        """Positions of a slot."""
        return self.cache.capacity


def _reserve(size: int) -> mmap.mmap:
    """Zeros in memory that the operating system provides page by page when it is first written."""
    # Not torch.zeros, which writes every page. Private, as malloc's: no file system's limits apply to it.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Every slot has scratch positions at its end: with huge pages, they would bring in almost the whole cache.
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def cache_shape(base: PreTrainedModel) -> tuple[int, int, int]:
    """Number of layers, number of key/value heads and head width of a base model.

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
    layers, heads, head_dim = cache_shape(base)
    return 2 * layers * heads * head_dim * base.dtype.itemsize
