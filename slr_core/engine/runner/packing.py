"""How rows share forward passes: rows of similar length, or rows of any length packed into one batch.

Single positions are sorted by adapter, so that linear layers find the rows of an adapter next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.scheduler import Work
from slr_core.engine.sequence import Sequence

_GATHERING_COST = 2
"""Reading copied keys and values takes as long as reading so many times their positions in the slots."""
_GATHERED_QUERIES = 8
"""Maximum positions of a row that are copied with single positions of others: each gets a copy of its own."""
PACKED_POSITIONS = 256
"""Maximum positions of a packed pass. In larger passes, reading the weights once more hardly matters."""


def split_into_passes(work: Iterable[Work], *, packing: bool) -> list[list[Work]]:
    """Split a step into passes of rows of similar length: one position, up to 2, up to 4, up to 8, and so on.

    Rows without a pass are left out. With ``packing``, a step of few positions is one pass.
    """
    ordered = sorted((row for row in work if row.queries), key=lambda row: (length_class(row), row.sequence.slot))
    if packing and sum(row.queries for row in ordered) <= PACKED_POSITIONS:
        singles = [row for row in ordered if row.queries == 1]
        return [sorted(singles, key=_adapter_order) + ordered[len(singles) :]] if ordered else []
    return [list(rows) for _, rows in groupby(ordered, key=length_class)]


def _adapter_order(row: Work) -> int:
    adapter = row.sequence.adapter_id
    return -1 if adapter is None else adapter


def length_class(row: Work) -> int:
    """0 for one position, 1 for 2, 2 for up to 4, 3 for up to 8, and so on."""
    return (row.queries - 1).bit_length()


def read_width(work: Iterable[Work]) -> int:
    """End of the cache positions that a pass of these rows reads."""
    return max(sequence.cache_start + sequence.filled + queries for sequence, queries in work)


def group_by_adapter_set(sequences: Iterable[Sequence]) -> list[list[Sequence]]:
    """Group rows by their loop adapter set, and by whether they read the LM head at every iteration.

    In the workspace ``token``, rows whose prompt loops are another group than rows with a token: they differ in width.
    """
    groups: dict[tuple[int, bool, bool], list[Sequence]] = {}
    for sequence in sequences:
        loops_token = sequence.token is not None and bool(sequence.token.loops)
        groups.setdefault((id(sequence.adapter_set), sequence.reads_head, loops_token), []).append(sequence)
    return list(groups.values())


def stack_states(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack states ``[W, d]`` to ``[n, W, d]``.

    Returns:
        The states, and ``[n, W]`` bool, which positions are valid; ``None``: all, since the widths are equal.
    """
    widths = [state.shape[0] for state in states]  # len() of a tensor is slow
    if len(set(widths)) == 1:
        return torch.stack(states), None
    padded = pad_sequence(states, batch_first=True)
    order = torch.arange(padded.shape[1], device=padded.device)
    return padded, order < torch.tensor(widths, device=padded.device)[:, None]


@dataclass(frozen=True)
class PackedSegment:
    """Positions that attend in one call: single ones of several slots, several of one slot, or any that are gathered.

    Attributes:
        rows: the rows of the batch.
        mask: ``[n, 1, q, positions]`` bool.
        source: what is read of each layer's keys and values, ``[n, heads, positions, head_dim]`` each.
        active_slots: ``[m]`` long, which of the ``n`` each row is; ``None``: one after another.
    """

    rows: slice
    mask: Tensor
    source: SlotRange | GatheredVectors
    active_slots: Tensor | None = None


@dataclass(frozen=True)
class SlotRange:
    """The same positions of neighbouring slots, read without a copy.

    Attributes:
        slots: the slots.
        first: the first position.
        end: the end of the positions.
    """

    slots: slice
    first: int
    end: int

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A view of the keys and values of all slots."""
        positions = slice(self.first, self.end)
        return keys[self.slots, :, positions], values[self.slots, :, positions]


@dataclass(frozen=True)
class GatheredVectors:
    """Keys or values of rows that begin at different positions of their slots.

    Attributes:
        index: ``[n * heads * positions]`` long, places in the vectors ``[slots * heads * (capacity + 1), head_dim]``.
        keys: space for them, ``[n, heads, positions, head_dim]``.
        values: the same.
    """

    index: Tensor
    keys: Tensor
    values: Tensor

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copy them from the keys and values of all slots; valid until the next call."""
        for source, target in ((keys, self.keys), (values, self.values)):
            size = source.shape[-1]
            torch.index_select(source.view(-1, size), 0, self.index, out=target.view(-1, size))
        return self.keys, self.values


@dataclass
class PackedBatch:
    """The segments of a packed pass. The model passes it through to :func:`attention.attend`.

    Attributes:
        segments: together they hold every row of the batch once.
        reached_attention: the model has passed it through.
    """

    segments: list[PackedSegment]
    reached_attention: bool = False


def pack(work: Rows[Work], positions: Tensor, cache: KVCache) -> PackedBatch:
    """Describe which rows of a packed batch belong together.

    Args:
        work: single positions first; every other row is a segment of its own.
        positions: ``[m]`` long, the cache position of each row of the batch.
        cache: the slots.
    """
    segments, order = [], torch.arange(read_width(work), device=positions.device)
    joined = [row for row in work if row.queries == 1]
    if joined:
        first, end = min(sequence.cache_start for sequence, _ in joined), read_width(joined)
        longest = max(sequence.filled + 1 for sequence, _ in joined)
        if _GATHERING_COST * longest < end - first:
            joined = _rows_to_gather(work, longest)
            segments.append(_gather(joined, cache))
        else:
            segments.append(_read_slots([row.sequence for row in joined], positions, first, order[first:end]))
    start = sum(row.queries for row in joined)
    for sequence, queries in work[len(joined) :]:
        rows, first = slice(start, start + queries), sequence.cache_start
        width = first + sequence.filled + queries
        mask = (order[first:width] <= positions[rows, None])[None, None]
        slot = slice(sequence.slot, sequence.slot + 1)
        segments.append(PackedSegment(rows, mask, SlotRange(slot, first, width)))
        start += queries
    return PackedBatch(segments)


def _rows_to_gather(work: Rows[Work], longest: int) -> list[Work]:
    """The first rows that are copied together: single positions, and short rows that do not lengthen every copy.

    Args:
        work: single positions first.
        longest: maximum number of positions that a single position reads.
    """
    longest = max(longest, _GATHERED_QUERIES)  # a whole prompt that short always joins
    return list(takewhile(lambda w: w.queries <= _GATHERED_QUERIES and w.sequence.filled + w.queries <= longest, work))


def _gather(work: list[Work], cache: KVCache) -> PackedSegment:
    """A segment in which each position reads a copy of its own key/value cache alone."""
    device, (_, _, _, heads, positions, size) = cache.store.device, cache.store.shape
    rows = [(s.slot, s.cache_start, s.filled + i) for s, queries in work for i in range(queries)]
    slot, start, last = torch.tensor(rows, device=device).t()[..., None]
    order = torch.arange(max(last for _, _, last in rows) + 1, device=device)
    first = (slot * heads + torch.arange(heads, device=device)) * positions + start
    # What is masked repeats the row's own last position: any other row's may not be finite.
    index = first[..., None] + torch.minimum(order, last)[:, None]
    keys, values = cache.store.new_empty(2, len(rows), heads, len(order), size)
    mask = (order <= last)[:, None, None]
    return PackedSegment(slice(0, len(rows)), mask, GatheredVectors(index.view(-1), keys, values))


def _read_slots(sequences: list[Sequence], positions: Tensor, first: int, order: Tensor) -> PackedSegment:
    """A segment that reads the slots from the first to the last row's without a copy.

    Args:
        sequences: a single position each.
        positions: ``[m]`` long, the cache position of each row of the batch.
        first: the first position that is read.
        order: ``[positions]`` long, those that are read.
    """
    slots, starts = [sequence.slot for sequence in sequences], [sequence.cache_start for sequence in sequences]
    span, rows = slice(min(slots), max(slots) + 1), slice(0, len(slots))
    mask, active_slots = order <= positions[rows, None], None
    if max(starts) > first:
        mask &= order >= torch.tensor(starts, device=positions.device)[:, None]
    if slots != list(range(span.start, span.stop)):
        active_slots = torch.tensor(slots, device=positions.device) - span.start
        # Slots without a row attend to the first position, so that no row of the mask is empty.
        mask = (order == first).repeat(span.stop - span.start, 1).index_copy_(0, active_slots, mask)
    return PackedSegment(rows, mask[:, None, None], SlotRange(span, first, first + len(order)), active_slots)
