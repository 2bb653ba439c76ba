"""One forward pass of the base model for rows that do different things: prefill, an iteration, a token."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slr_core.base import attention_mask
from slr_core.engine.bank import AdapterBank
from slr_core.engine.cache import SlotCache
from slr_core.engine.scheduler import Work
from slr_core.engine.sequence import Phase, Sequence
from slr_core.engine.static import StaticPasses


def by_length(work: Iterable[Work]) -> list[list[Work]]:
    """Split a step into passes: single positions, then up to 2, 4, 8, ...: little of a pass is padding."""

    def length_class(item: Work) -> int:
        return (item[1] - 1).bit_length()

    ordered = sorted((item for item in work if item[1]), key=lambda item: (length_class(item), item[0].slot))
    return [list(rows) for _, rows in groupby(ordered, key=length_class)]


def by_loop_set(rows: Iterable[Sequence]) -> list[list[Sequence]]:
    """Split rows by the loop set that they run, and by whether they read the head at every iteration."""
    groups: dict[tuple[int, bool], list[Sequence]] = {}
    for row in rows:
        groups.setdefault((id(row.loops), row.reads_head), []).append(row)
    return list(groups.values())


class Passes:
    """Runs the base model over the slots.

    Args:
        bank: the base model, with its adapters.
        cache: the slots.
        static: single positions run in fixed shapes; see :mod:`slr_core.engine.static`.
    """

    def __init__(self, bank: AdapterBank, cache: SlotCache, *, static: bool = False) -> None:
        self.static = StaticPasses(bank, cache) if static else None
        self.bank, self.cache, self.model, self.device = bank, cache, bank.model, bank.model.device
        self.embeddings: nn.Module = bank.model.get_input_embeddings()
        table = self.embeddings.weight
        assert isinstance(table, Tensor)
        self.table = table

    def run(self, work: Rows[Work]) -> Tensor:
        """One pass: states ``[n, q, d]``, of which each row's first ones are its own. Slots ascend.

        It changes nothing but the slots' columns from each row's ``filled`` on, so it can be repeated.
        """
        device, queries = self.device, max(count for _, count in work)
        embeds, adapters = self._inputs(work, queries), [_adapter(row) for row, _ in work]
        if self.static is not None and queries == 1:
            return self.static.run([row.slot for row, _ in work], [row.filled for row, _ in work], adapters, embeds)
        starts = torch.tensor([row.filled for row, _ in work], device=device)
        if len({count for _, count in work}) == 1:
            columns = positions = starts[:, None] + torch.arange(queries, device=device)
        else:
            order = torch.arange(queries, device=device)
            real = order < torch.tensor([count for _, count in work], device=device)[:, None]
            columns = torch.where(real, starts[:, None] + order, self.cache.capacity)
            # Padding looks at the first column, so that it sees something finite.
            positions = torch.where(real, columns, 0)
        width = max(row.filled + count for row, count in work)
        mask = torch.arange(width, device=device) <= positions[..., None]
        self.cache.bind([row.slot for row, _ in work], columns, width)
        self.bank.use(adapters)
        output = self.model.base_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask(self.model, mask, embeds.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _inputs(self, work: Rows[Work], queries: int) -> Tensor:
        device = self.device
        tokens = [(i, row, count) for i, (row, count) in enumerate(work) if row.phase in (Phase.PREFILL, Phase.DECODE)]
        embeds: Tensor | None = None
        if tokens:
            ids = [_tokens(row, count) for _, row, count in tokens]
            padded = [x + [0] * (queries - len(x)) for x in ids]
            embeds = self.embeddings(torch.tensor(padded, device=device))
            if len(tokens) == len(work):
                return embeds
        inputs = self.table.new_zeros(len(work), queries, self.table.shape[1])
        if embeds is not None:
            inputs[torch.tensor([i for i, _, _ in tokens], device=device)] = embeds
        places = {id(row): i for i, (row, _) in enumerate(work)}
        latent = [row for row, _ in work if row.phase in (Phase.LOOP, Phase.CLOSE)]
        for group in by_loop_set(latent):
            for phase, rows in ((p, [row for row in group if row.phase is p]) for p in (Phase.LOOP, Phase.CLOSE)):
                if rows:
                    u = looped(rows) if phase is Phase.LOOP else closing(rows)
                    inputs[torch.tensor([places[id(row)] for row in rows], device=device), : u.shape[1]] = u
        return inputs


def looped(rows: Rows[Sequence]) -> Tensor:
    """The inputs ``[n, W, d]`` of the next iteration of rows of one loop set."""
    hidden, _ = stacked([row.states[-1] for row in rows])
    return rows[0].loops.inputs(hidden, [row.t + 1 for row in rows], [row.change for row in rows])


def closing(rows: Rows[Sequence]) -> Tensor:
    """The inputs ``[n, W, d]`` of the closing pass; a prompt whose loop kept no iteration runs as it is."""
    hidden, _ = stacked([row.states[row.row.kept] for row in rows])
    projected = rows[0].loops.reasoner.project_in(hidden)
    kept = torch.tensor([row.row.kept > 0 for row in rows], device=hidden.device)
    return torch.where(kept[:, None, None], projected, hidden)


def stacked(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """States ``[W, d]`` as ``[n, W, d]``, and where their widths differ ``[n, W]`` bool: which positions are real."""
    widths = [len(state) for state in states]
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
        case Phase.CLOSE | Phase.DECODE if row.row.kept:
            return row.loops.decode_adapter
        case _:
            return None
