"""One forward pass of the base model for rows that do different things: prefill, an iteration, a token."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slr_core.engine.runner.attention import PackedBatch, PackedSegment, supports_packing
from slr_core.engine.runner.fixed_shapes import FixedShapeRunner
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.scheduler import Work
from slr_core.engine.sequence import Phase, Sequence
from slr_core.model.base_support import attention_mask

JOINED_POSITIONS = 256
"""Of a pass that takes rows of any length together, at most; beyond, reading the weights once more hardly matters."""


def by_length(work: Iterable[Work], *, join: bool = True) -> list[list[Work]]:
    """Split a step into passes: single positions, then up to 2, 4, 8, ...: little of a pass is padding.

    A step of few positions is one pass, as long as it may ``join`` them.
    """
    ordered = sorted((item for item in work if item[1]), key=lambda item: (_length_class(item), item[0].slot))
    if join and sum(count for _, count in ordered) <= JOINED_POSITIONS:
        return [ordered] if ordered else []
    return [list(rows) for _, rows in groupby(ordered, key=_length_class)]


def _length_class(item: Work) -> int:
    return (item[1] - 1).bit_length()


def _width(work: Iterable[Work]) -> int:
    return max(row.filled + count for row, count in work)


def by_loop_set(rows: Iterable[Sequence]) -> list[list[Sequence]]:
    """Split rows by the loop set that they run, and by whether they read the head at every iteration."""
    groups: dict[tuple[int, bool], list[Sequence]] = {}
    for row in rows:
        groups.setdefault((id(row.loops), row.reads_head), []).append(row)
    return list(groups.values())


class ModelRunner:
    """Runs the base model over the slots.

    Args:
        bank: the base model, with its adapters.
        cache: the slots.
        static: single positions run in fixed shapes; see :mod:`slr_core.engine.runner.fixed_shapes`.
    """

    def __init__(self, bank: LoraBatch, cache: KVCache, *, static: bool = False) -> None:
        self.static = FixedShapeRunner(bank, cache) if static else None
        self.supports_packing = not static and supports_packing(bank.model)
        """Whether rows of different length classes can share a pass."""
        self.bank, self.cache, self.model, self.device = bank, cache, bank.model, bank.model.device
        self.embeddings: nn.Module = bank.model.get_input_embeddings()
        table = self.embeddings.weight
        assert isinstance(table, Tensor)
        self.table = table

    def run(self, work: Rows[Work]) -> list[Tensor]:
        """One pass over rows as :func:`by_length` has ordered them: each row's states ``[count, d]``.

        It changes nothing but the slots' columns from each row's ``filled`` on, so it can be repeated.
        """
        counts, inputs, adapters = [count for _, count in work], self._inputs(work), [_adapter(row) for row, _ in work]
        if len(set(map(_length_class, work))) > 1:
            return list(torch.split(self._joined(work, adapters, inputs), counts))
        slots, starts, queries = [row.slot for row, _ in work], [row.filled for row, _ in work], max(counts)
        if self.static is not None and queries == 1:
            return list(self.static.run(slots, starts, adapters, inputs[:, None]))
        order = torch.arange(queries, device=self.device)
        columns = positions = torch.tensor(starts, device=self.device)[:, None] + order
        if len(set(counts)) == 1:
            embeds = inputs.view(len(work), queries, -1)
        else:
            real = order < torch.tensor(counts, device=self.device)[:, None]
            embeds = inputs.new_zeros(len(work), queries, inputs.shape[1])
            embeds[real] = inputs
            # Padding looks at the first column, so that it sees something finite.
            columns, positions = torch.where(real, columns, self.cache.capacity), torch.where(real, positions, 0)
        hidden = self._apart(slots, adapters, embeds, columns, positions, _width(work))
        return [states[:count] for states, count in zip(hidden, counts, strict=True)]

    def run_idle(self, rows: int, columns: int) -> Tensor:
        """A pass of single positions, each with another adapter, over the first ``columns``: states ``[rows, d]``.

        For who measures. It writes what it reads: every slot must be free.
        """
        count = self.bank.count
        adapters = [row % count if count else None for row in range(rows)]
        embeds = self.table.new_zeros(rows, 1, self.table.shape[1])
        if self.static is not None:
            return self.static.run(range(rows), [columns - 1] * rows, adapters, embeds)[:, 0]
        last = torch.full((rows, 1), columns - 1, device=self.device)
        return self._apart(range(rows), adapters, embeds, last, last, columns)[:, 0]

    def _apart(
        self,
        slots: Rows[int],
        adapters: list[int | None],
        embeds: Tensor,
        columns: Tensor,
        positions: Tensor,
        width: int,
    ) -> Tensor:
        """Every row a slot; inputs ``[n, q, d]`` at columns and positions ``[n, q]``: states ``[n, q, d]``."""
        self.cache.bind(slots, columns, width)
        self.bank.use(adapters)
        mask = torch.arange(width, device=self.device) <= positions[..., None]
        return self._forward(embeds, positions, attention_mask=attention_mask(self.model, mask, embeds.dtype))

    def _forward(self, embeds: Tensor, positions: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self.model.base_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True, **options
        ).last_hidden_state
        return hidden

    def _joined(self, work: Rows[Work], adapters: list[int | None], inputs: Tensor) -> Tensor:
        """Every position a row of the model's batch: states ``[m, d]``."""
        owners = [row for row, (_, count) in enumerate(work) for _ in range(count)]
        columns = torch.tensor([row.filled + i for row, count in work for i in range(count)], device=self.device)
        self.cache.bind([work[row][0].slot for row in owners], columns[:, None], self.cache.capacity, whole=True)
        self.bank.use([adapters[row] for row in owners])
        return self._forward(inputs[:, None], columns[:, None], joint=PackedBatch(self._parts(work, columns)))[:, 0]

    def _parts(self, work: Rows[Work], columns: Tensor) -> list[PackedSegment]:
        parts, order = [], torch.arange(_width(work), device=self.device)
        singles = [row for row, count in work if count == 1]
        if singles:
            slots, width = [row.slot for row in singles], max(row.filled for row in singles) + 1
            span, own = slice(slots[0], slots[-1] + 1), slice(0, len(slots))
            mask, among = order[:width] <= columns[own, None], None
            if span.stop - span.start > len(slots):
                among = torch.tensor(slots, device=self.device) - span.start
                # Who is not among them looks at the first column, so that it sees something finite.
                mask = (order[:width] < 1).repeat(span.stop - span.start, 1).index_copy_(0, among, mask)
            parts.append(PackedSegment(own, span, width, mask[:, None, None], among))
        start = len(singles)
        for row, count in work[len(singles) :]:
            own, width = slice(start, start + count), row.filled + count
            mask = order[:width] <= columns[own, None]
            parts.append(PackedSegment(own, slice(row.slot, row.slot + 1), width, mask[None, None]))
            start += count
        return parts

    def _inputs(self, work: Rows[Work]) -> Tensor:
        """What the rows feed, one after another: ``[m, d]``."""
        ids: list[int] = []
        tokens: list[int] = []
        places: dict[Sequence, range] = {}
        start = 0
        for row, count in work:
            places[row] = range(start, start + count)
            if row.phase in (Phase.PREFILL, Phase.DECODE):
                ids += _tokens(row, count)
                tokens += places[row]
            start += count
        embeds: Tensor | None = self.embeddings(torch.tensor(ids, device=self.device)) if ids else None
        if embeds is not None and len(tokens) == start:
            return embeds
        inputs = self.table.new_empty(start, self.table.shape[1])
        if embeds is not None:
            inputs[torch.tensor(tokens, device=self.device)] = embeds
        latent = [row for row, _ in work if row.phase in (Phase.LOOP, Phase.CLOSE)]
        for group in by_loop_set(latent):
            for phase, rows in ((p, [row for row in group if row.phase is p]) for p in (Phase.LOOP, Phase.CLOSE)):
                if rows:
                    u = looped(rows) if phase is Phase.LOOP else closing(rows)
                    own = [place for row in rows for place in places[row]]
                    if len(own) < u.shape[0] * u.shape[1]:
                        u = torch.cat([x[: len(places[row])] for row, x in zip(rows, u, strict=True)])
                    u = u.reshape(-1, u.shape[-1])
                    if len(own) == start:
                        return u
                    inputs[torch.tensor(own, device=self.device)] = u
        return inputs


def looped(rows: Rows[Sequence]) -> Tensor:
    """The inputs ``[n, W, d]`` of the next iteration of rows of one loop set."""
    hidden, _ = stacked([row.states[-1] for row in rows])
    return rows[0].loops.inputs(hidden, [row.t + 1 for row in rows], [row.change for row in rows])


def closing(rows: Rows[Sequence]) -> Tensor:
    """The inputs ``[n, W, d]`` of the closing pass; a prompt whose loop kept no iteration runs as it is."""
    hidden, _ = stacked([row.states[row.row.kept_iterations] for row in rows])
    projected = rows[0].loops.reasoner.project_in(hidden)
    kept = torch.tensor([row.row.kept_iterations > 0 for row in rows], device=hidden.device)
    return torch.where(kept[:, None, None], projected, hidden)


def stacked(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States ``[W, d]`` as ``[n, W, d]``, and where their widths differ ``[n, W]`` bool: which positions are real."""
    widths = [state.shape[0] for state in states]  # len() of a tensor is slow
    if len(set(widths)) == 1:
        return torch.stack(states), None
    together = pad_sequence(states, batch_first=True)
    order = torch.arange(together.shape[1], device=together.device)
    return together, order < torch.tensor(widths, device=together.device)[:, None]


def _tokens(row: Sequence, count: int) -> list[int]:
    if row.phase is Phase.PREFILL:
        return list(row.request.prompt_ids[row.filled : row.filled + count])
    return row.pending


def _adapter(row: Sequence) -> int | None:
    match row.phase:
        case Phase.LOOP:
            return row.loops.adapter(row.t + 1)
        case Phase.CLOSE | Phase.DECODE if row.row.kept_iterations:
            return row.loops.decode_adapter
        case _:
            return None
