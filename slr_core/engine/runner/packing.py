"""How rows share forward passes: rows of similar length, or rows of any length packed into one batch."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slr_core.engine.scheduler import Work
from slr_core.engine.sequence import Sequence

PACKED_POSITIONS = 256
"""Maximum positions of a packed pass. In larger passes, reading the weights once more hardly matters."""


def split_into_passes(work: Iterable[Work], *, packing: bool) -> list[list[Work]]:
    """Split a step into passes of rows of similar length: one position, up to 2, up to 4, up to 8, and so on.

    Rows without a pass are left out. With ``packing``, a step of few positions is one pass.
    """
    ordered = sorted((row for row in work if row.queries), key=lambda row: (length_class(row), row.sequence.slot))
    if packing and sum(row.queries for row in ordered) <= PACKED_POSITIONS:
        return [ordered] if ordered else []
    return [list(rows) for _, rows in groupby(ordered, key=length_class)]


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
    """Rows that attend in one call: single positions of several slots, or several positions of one slot.

    Attributes:
        rows: the rows of the batch.
        slots: the slots that are read.
        first: the first position that is read.
        width: the end of the positions that are read.
        mask: ``[n, 1, q, width - first]`` bool, for ``n`` slots.
        active_slots: ``[m]`` long, which of the slots have a row; ``None``: all.
    """

    rows: slice
    slots: slice
    first: int
    width: int
    mask: Tensor
    active_slots: Tensor | None = None


@dataclass
class PackedBatch:
    """The segments of a packed pass. The model passes it through to :func:`attention.attend`.

    Attributes:
        segments: together they hold every row of the batch once.
        reached_attention: the model has passed it through.
    """

    segments: list[PackedSegment]
    reached_attention: bool = False


def pack(work: Rows[Work], positions: Tensor) -> PackedBatch:
    """Describe which rows of a packed batch belong together.

    Args:
        work: single positions first, in order of slots; every other row is a segment of its own.
        positions: ``[m]`` long, the cache position of each row of the batch.
    """
    segments, order = [], torch.arange(read_width(work), device=positions.device)
    singles = [sequence for sequence, queries in work if queries == 1]
    if singles:
        segments.append(_pack_singles(singles, positions, order))
    start = len(singles)
    for sequence, queries in work[len(singles) :]:
        rows, first = slice(start, start + queries), sequence.cache_start
        width = first + sequence.filled + queries
        mask = order[first:width] <= positions[rows, None]
        segments.append(PackedSegment(rows, slice(sequence.slot, sequence.slot + 1), first, width, mask[None, None]))
        start += queries
    return PackedBatch(segments)


def _pack_singles(sequences: list[Sequence], positions: Tensor, order: Tensor) -> PackedSegment:
    slots, starts = [sequence.slot for sequence in sequences], [sequence.cache_start for sequence in sequences]
    first, width = min(starts), max(sequence.cache_start + sequence.filled for sequence in sequences) + 1
    span, rows = slice(slots[0], slots[-1] + 1), slice(0, len(slots))
    order = order[first:width]
    mask, active_slots = order <= positions[rows, None], None
    if max(starts) > first:
        mask &= order >= torch.tensor(starts, device=positions.device)[:, None]
    if span.stop - span.start > len(slots):
        active_slots = torch.tensor(slots, device=positions.device) - span.start
        # Slots without a row attend to the first position, so that no row of the mask is empty.
        mask = (order == first).repeat(span.stop - span.start, 1).index_copy_(0, active_slots, mask)
    return PackedSegment(rows, span, first, width, mask[:, None, None], active_slots)
