"""ModelRunner of single positions in fixed shapes, which a GPU can replay as graphs instead of launching every kernel.

A row is a slot: the first 1, 2, 4, ... slots run together, whoever has nothing to do among them runs idly. Columns are
read up to a power of two. So few shapes occur that each is captured once, with buffers that keep their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import AdapterIndex, LoraBatch
from slr_core.model.base_support import attention_mask, hidden_size

_FEWEST_COLUMNS = 64
_WARM_UP = 3  # runs before a capture: libraries allocate what they need, and choose their kernels


class FixedShapeRunner:
    """Loop and decode passes over the slots. Without a GPU they run in the same shapes, uncaptured.

    Args:
        bank: the base model, with its adapters.
        cache: the slots.
    """

    def __init__(self, bank: LoraBatch, cache: KVCache) -> None:
        self.bank, self.cache, self.device = bank, cache, bank.model.device
        slots, width = cache.slots, hidden_size(bank.model)
        self.inputs = torch.zeros(slots, 1, width, dtype=bank.model.dtype, device=self.device)
        self.columns = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.owners = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._graphs: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        self._fillings = bank.fillings
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(
        self, slots: Sequence[int], starts: Sequence[int], adapters: Sequence[int | None], embeds: Tensor
    ) -> Tensor:
        """One pass.

        Args:
            slots: of its rows, ascending.
            starts: the column that each row writes.
            adapters: each row's place in the bank.
            embeds: ``[n, 1, d]``.

        Returns:
            States ``[n, 1, d]``, a copy.
        """
        if self._fillings != self.bank.fillings:  # graphs hold the addresses of adapters that are gone
            self._graphs.clear()
            self._fillings = self.bank.fillings
        rows = min(_power_of_two(slots[-1] + 1), self.cache.slots)
        width = min(max(_power_of_two(max(starts) + 1), _FEWEST_COLUMNS), self.cache.capacity)
        columns, owners = [self.cache.capacity] * rows, [-1] * rows
        for slot, start, adapter in zip(slots, starts, adapters, strict=True):
            columns[slot], owners[slot] = start, -1 if adapter is None else adapter
        table = torch.tensor([columns, owners, [*slots, *[0] * (rows - len(slots))]], device=self.device)
        mine = table[2, : len(slots)]
        self.inputs[:rows].zero_()
        self.inputs[mine] = embeds
        self.columns[:rows, 0] = table[0]
        self.owners[:rows] = table[1]
        shape = rows, width, any(adapter is not None for adapter in adapters)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(*shape)
        return self._graphs[shape]()[mine]

    def _capture(self, rows: int, width: int, adapted: bool) -> Callable[[], Tensor]:
        slots, order = list(range(rows)), torch.arange(width, device=self.device)

        def run() -> Tensor:
            inputs, columns = self.inputs[:rows], self.columns[:rows]
            # Idle rows write where nobody looks, and look at the first column, so that they see something finite.
            positions = columns.masked_fill(columns == self.cache.capacity, 0)
            self.bank.rows = AdapterIndex(self.owners[:rows], self.bank.count) if adapted else None
            hidden: Tensor = self.bank.model.base_model(
                inputs_embeds=inputs,
                attention_mask=attention_mask(self.bank.model, order <= positions[..., None], inputs.dtype),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
            return hidden

        def bound() -> Tensor:
            self.cache.bind(slots, self.columns[:rows], width)
            return run()

        return bound if self._pool is None else self._graph(bound, run)

    def _graph(self, warm_up: Callable[[], Tensor], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                warm_up()
        current.wait_stream(stream)
        graph, bound = torch.cuda.CUDAGraph(), self.cache.rows
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()

        return _Graph(graph, output, bound)


@dataclass(frozen=True)
class _Graph:
    """A pass that was captured.

    Attributes:
        graph: replayed by a call.
        output: what it writes, overwritten by the next one.
        reads: what must live as long as it, besides the buffers and the weights.
    """

    graph: torch.cuda.CUDAGraph
    output: Tensor
    reads: Tensor

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.output


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
