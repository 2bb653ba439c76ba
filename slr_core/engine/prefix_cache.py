"""Prefix cache: keys and values of prompt prefixes, kept after their requests have finished.

A prompt's full blocks of :data:`BLOCK` tokens have the hash of all tokens up to the block's end as key, so equal
prefixes have equal keys: system prompts and few-shot examples are prefilled once. One more key stands for the whole
prompt. Its entry also holds the state after the prompt, so ``n`` samples of one prompt are prefilled once. Prefill
runs the base model, so all loop adapter sets share the entries, but for those whose adapter covers the prompt. In the
workspace ``token`` an entry holds the keys and values of every iteration, and the requests of one loop adapter set with
equal ``max_iterations`` share it.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import NamedTuple, Protocol

from torch import Tensor

BLOCK = 16
"""Tokens of a block."""


def prefix_keys(ids: tuple[int, ...], salt: bytes = b"") -> tuple[bytes, ...]:
    """Keys of a prompt's full blocks, then the key of the whole prompt; other salts give other keys."""
    digest, keys = blake2b(salt, digest_size=16), []
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        digest.update(b"".join(token.to_bytes(8, "little") for token in block))
        if len(block) == BLOCK:
            keys.append(digest.digest())
    digest.update(b"end")
    return (*keys, digest.digest())


class SlotMemory(Protocol):
    """Keys and values of slots: a :class:`slr_core.engine.runner.kv_cache.KVCache` or its view of several copies."""

    def read(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of positions ``start`` to ``end``: ``[..., end - start, head_dim]``."""
        ...

    def write(self, slot: int, start: int, keys_values: Tensor) -> None:
        """Write what :meth:`read` returned."""
        ...


class _Entry(NamedTuple):
    keys_values: Tensor
    """``[..., layers, 2, heads, positions, head_dim]``."""
    state: Tensor | None
    """The state ``[d]`` after the prompt, in the entry of a whole prompt."""

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes + (0 if self.state is None else self.state.nbytes)


class PrefixCache:
    """Least recently used prefixes are evicted first.

    Args:
        max_bytes: maximum memory; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def known(self, keys: tuple[bytes, ...]) -> int:
        """Number of a prompt's keys that are cached, counted up to the first that is not."""
        return next((i for i, key in enumerate(keys) if key not in self._entries), len(keys))

    def restore(
        self, keys: tuple[bytes, ...], prompt_tokens: int, cache: SlotMemory, slot: int
    ) -> tuple[int, Tensor | None]:
        """Copy the longest cached prefix into a slot.

        Returns:
            The number of positions filled, and the state ``[d]`` after the prompt if the whole prompt was cached. If
            it was not, at least one token is left to run.
        """
        count = self.known(keys)
        if count < len(keys):
            count = min(count, (prompt_tokens - 1) // BLOCK)
        filled, state = 0, None
        for key in keys[:count]:
            keys_values, state = self._entries[key]
            cache.write(slot, filled, keys_values)
            filled += keys_values.shape[-2]
        self._mark_used(keys[:count])
        return filled, state

    def save(
        self, keys: tuple[bytes, ...], prompt_tokens: int, cache: SlotMemory, slot: int, state: Tensor | None
    ) -> None:
        """Store the prefixes of a prompt that was just prefilled, as far as memory allows.

        Without a ``state`` ``[d]`` after the prompt, the whole prompt is no entry.
        """
        for index, key in enumerate(keys):
            if key in self._entries:
                continue
            is_whole = index == len(keys) - 1
            if is_whole and state is None:
                break
            end = prompt_tokens if is_whole else (index + 1) * BLOCK
            entry = _Entry(
                cache.read(slot, index * BLOCK, end), state.clone() if is_whole and state is not None else None
            )
            if entry.nbytes > self.max_bytes:
                break
            self._entries[key] = entry
            self.bytes += entry.nbytes
        self._mark_used(keys[: self.known(keys)])
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def _mark_used(self, keys: tuple[bytes, ...]) -> None:
        # Later blocks are evicted before earlier ones: without the earlier ones they cannot be used.
        for key in reversed(keys):
            self._entries.move_to_end(key)
