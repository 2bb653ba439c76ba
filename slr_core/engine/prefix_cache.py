"""Prefix reuse: the keys and values of prompt beginnings, kept after their requests are gone.

A prompt's whole blocks of :data:`BLOCK` tokens are named by the hash of everything up to their end, so that a
name says the same wherever it comes up: system prompts and few-shot examples are prefilled once. One more name
stands for the whole prompt; its entry also keeps h_0, so that ``n`` samples of one prompt are prefilled once.
The prefill is always the base model's, whatever loop set a request names: all of them share what is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import NamedTuple

from torch import Tensor

from slr_core.engine.runner.kv_cache import KVCache

BLOCK = 16
"""Tokens of a block."""


def prefix_keys(ids: tuple[int, ...]) -> tuple[bytes, ...]:
    """The names of a prompt's whole blocks, then that of the prompt."""
    digest, keys = blake2b(digest_size=16), []
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        digest.update(b"".join(token.to_bytes(8, "little") for token in block))
        if len(block) == BLOCK:
            keys.append(digest.digest())
    digest.update(b"end")
    return (*keys, digest.digest())


class _Entry(NamedTuple):
    columns: Tensor
    state: Tensor | None

    @property
    def size(self) -> int:
        state = 0 if self.state is None else self.state.nbytes
        return self.columns.nbytes + state


class PrefixCache:
    """What is kept of prompts, least recently used first out.

    Args:
        max_bytes: memory for it; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def known(self, keys: tuple[bytes, ...]) -> int:
        """How many of a prompt's keys are at hand, from the first."""
        return next((i for i, key in enumerate(keys) if key not in self._entries), len(keys))

    def restore(
        self, keys: tuple[bytes, ...], prompt_tokens: int, cache: KVCache, slot: int
    ) -> tuple[int, Tensor | None]:
        """Fill a slot with the longest known beginning: the columns filled, and h_0 ``[d]`` if that is all of it.

        Without h_0 the last token is left to run, whatever is known.
        """
        count = self.known(keys)
        if count < len(keys):
            count = min(count, (prompt_tokens - 1) // BLOCK)
        filled, state = 0, None
        for key in keys[:count]:
            columns, state = self._entries[key]
            cache.put(slot, filled, columns)
            filled += columns.shape[-2]
        self._used(keys[:count])
        return filled, state

    def keep(self, keys: tuple[bytes, ...], prompt_tokens: int, cache: KVCache, slot: int, state: Tensor) -> None:
        """Keep a prompt that was just prefilled, as far as memory allows."""
        for index, key in enumerate(keys):
            if key in self._entries:
                continue
            whole = index == len(keys) - 1
            end = prompt_tokens if whole else (index + 1) * BLOCK
            entry = _Entry(cache.take(slot, index * BLOCK, end), state.clone() if whole else None)
            if entry.size > self.max_bytes:
                break
            self._entries[key] = entry
            self.bytes += entry.size
        self._used(keys[: self.known(keys)])
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].size

    def _used(self, keys: tuple[bytes, ...]) -> None:
        # Ends are forgotten before beginnings: without its beginning an end is of no use.
        for key in reversed(keys):
            self._entries.move_to_end(key)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.bytes = 0
