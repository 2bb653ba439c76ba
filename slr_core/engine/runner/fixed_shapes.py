"""Passes of single positions in few fixed shapes, which a GPU replays as CUDA graphs.

Every row is a slot: the first 1, 2, 4, ... slots run together, and slots without work run idly. Positions are read up
to a power of two. So few shapes occur that each is captured once, with buffers that keep their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import AdapterIndex, LoraBatch
from slr_core.model.base_support import attention_mask, hidden_size

MIN_WIDTH = 64
"""Fewest positions that a pass reads."""
_WARM_UP_RUNS = 3
"""Runs before a capture, in which libraries allocate memory and choose their kernels."""


class FixedShapeRunner:
    """Runs passes of single positions. Without a GPU the shapes are the same, but nothing is captured.

    Args:
        lora_batch: the base model with all adapters.
        cache: the slots.
    """

    def __init__(self, lora_batch: LoraBatch, cache: KVCache) -> None:
        self.lora_batch, self.cache, self.device = lora_batch, cache, lora_batch.model.device
        slots, width = cache.slots, hidden_size(lora_batch.model)
        self.inputs = torch.zeros(slots, 1, width, dtype=lora_batch.model.dtype, device=self.device)
        self.positions = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.cache_starts = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.adapter_ids = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._graphs: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        self._version = lora_batch.version
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        cache_starts: Sequence[int],
        adapter_ids: Sequence[int | None],
        embeds: Tensor,
    ) -> Tensor:
        """Run one pass.

        Args:
            slots: the slot of each row, in ascending order.
            positions: the position that each row writes, counted from ``cache_starts``.
            cache_starts: the position of its slot at which each row's key/value cache begins.
            adapter_ids: the adapter of each row.
            embeds: inputs ``[n, 1, d]``.

        Returns:
            States ``[n, 1, d]``, a copy.
        """
        if self._version != self.lora_batch.version:  # graphs hold addresses of adapters that no longer exist
            self._graphs.clear()
            self._version = self.lora_batch.version
        rows = min(_power_of_two(slots[-1] + 1), self.cache.slots)
        end = max(start + position for start, position in zip(cache_starts, positions, strict=True)) + 1
        width = min(max(_power_of_two(end), MIN_WIDTH), self.cache.capacity)
        write_at, begin, ids = [self.cache.capacity] * rows, [0] * rows, [-1] * rows
        for slot, position, start, adapter in zip(slots, positions, cache_starts, adapter_ids, strict=True):
            write_at[slot], begin[slot], ids[slot] = start + position, start, -1 if adapter is None else adapter
        table = torch.tensor([write_at, ids, [*slots, *[0] * (rows - len(slots))], begin], device=self.device)
        active = table[2, : len(slots)]
        self.inputs[:rows].zero_()
        self.inputs[active] = embeds
        self.positions[:rows, 0] = table[0]
        self.cache_starts[:rows, 0] = table[3]
        self.adapter_ids[:rows] = table[1]
        shape = rows, width, any(adapter is not None for adapter in adapter_ids)
        if shape not in self._graphs:
            self._graphs[shape] = self._prepare(*shape)
        return self._graphs[shape]()[active]

    def _prepare(self, rows: int, width: int, has_adapters: bool) -> Callable[[], Tensor]:
        slots, order = list(range(rows)), torch.arange(width, device=self.device)

        def run() -> Tensor:
            inputs, positions = self.inputs[:rows], self.positions[:rows]
            # Idle rows write to the scratch position and attend to the first one, so that no row of the mask is empty.
            write_at = positions.masked_fill(positions == self.cache.capacity, 0)
            starts = self.cache_starts[:rows]
            position_ids = write_at - starts
            mask = (order >= starts[..., None]) & (order <= write_at[..., None])
            lora_batch = self.lora_batch
            lora_batch.index = AdapterIndex(self.adapter_ids[:rows], lora_batch.count) if has_adapters else None
            hidden: Tensor = lora_batch.model.base_model(
                inputs_embeds=inputs,
                attention_mask=attention_mask(lora_batch.model, mask, inputs.dtype),
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
            return hidden

        def bind_and_run() -> Tensor:
            self.cache.bind(slots, self.positions[:rows], width)
            return run()

        return bind_and_run if self._pool is None else self._capture(bind_and_run, run)

    def _capture(self, warm_up: Callable[[], Tensor], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                warm_up()
        current.wait_stream(stream)
        graph, row_slots = torch.cuda.CUDAGraph(), self.cache.row_slots
        # Other threads may use the GPU during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()

        return CapturedPass(graph, output, row_slots)


@dataclass(frozen=True)
class CapturedPass:
    """A pass as a CUDA graph.

    Attributes:
        graph: the graph.
        output: its output, overwritten by every replay.
        row_slots: a tensor that the graph reads and that must therefore stay allocated.
    """

    graph: torch.cuda.CUDAGraph
    output: Tensor
    row_slots: Tensor

    def __call__(self) -> Tensor:
        """Replay the graph."""
        self.graph.replay()
        return self.output


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
