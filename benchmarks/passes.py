"""Forward passes of the base model without the engine, PEFT's mixed batches, and the parts of a step's time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from slr_core.engine import Engine
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.packing import length_class
from slr_core.engine.scheduler import Work
from slr_core.model.base_support import hidden_size


@dataclass(frozen=True)
class RecordedPasses:
    """The passes of an engine.

    Attributes:
        shapes: of each pass the rows, the positions of a row, and the cache positions that it reads.
        unpacked: the same, with single positions and prompts of each length class in separate passes, as a model
            without the engine would have to run them.
        heads: rows of each call of the LM head.
    """

    shapes: list[tuple[int, int, int]]
    unpacked: list[tuple[int, int, int]]
    heads: list[int]


@contextmanager
def record_passes(engine: Engine) -> Iterator[RecordedPasses]:
    """Record all passes inside the context."""
    passes = RecordedPasses([], [], [])

    def record(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        rows, queries, _ = options["inputs_embeds"].shape
        packed = options.get("packed")
        masks = [options["attention_mask"]] if packed is None else [segment.mask for segment in packed.segments]
        passes.shapes.append((rows, queries, max(mask.shape[-1] for mask in masks)))

    runner = engine._core.runner
    forward = runner.forward

    def record_rows(work: Sequence[Work]) -> list[torch.Tensor]:
        for _, group in groupby(sorted(work, key=length_class), key=length_class):
            rows = list(group)
            width = max(sequence.filled + queries for sequence, queries in rows)
            passes.unpacked.append((len(rows), max(row.queries for row in rows), width))
        return forward(work)

    def record_head(_module: Any, args: tuple[torch.Tensor]) -> None:
        passes.heads.append(len(args[0]))

    hooks = [
        engine.model.base_model.register_forward_pre_hook(record, with_kwargs=True),
        runner.head.register_forward_pre_hook(record_head),
    ]
    runner.forward = record_rows  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del runner.forward
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def run_bare(engine: Engine, shapes: list[tuple[int, int, int]], heads: list[int], cache: KVCache) -> None:
    """Run passes of these shapes with the base model alone, over a cache of as many rows as the largest has."""
    engine._lora_batch.index = None  # the engine is idle: its model runs without adapters
    for rows, queries, width in shapes:
        forward(engine.model, cache, rows, queries, width)
    head = engine._core.runner.head
    for rows in heads:
        head(torch.zeros(rows, hidden_size(engine.model)))


def forward(model: Any, cache: KVCache, rows: int, queries: int, width: int) -> None:
    """Run one pass whose rows read ``width`` positions of the cache."""
    positions = torch.arange(width - queries, width).expand(rows, queries)
    cache.bind(range(rows), positions, width)
    model.base_model(
        inputs_embeds=torch.ones(rows, queries, hidden_size(model)),
        attention_mask=(torch.arange(width) <= positions[..., None])[:, None],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )


@contextmanager
def use_peft_mixed_batch(base: nn.Module, names: list[str]) -> Iterator[None]:
    """PEFT's mixed batch: what ``adapter_names`` does in a PeftModel, for injected adapters."""

    def add_names(_module: Any, args: Any, options: dict[str, Any], adapter_names: list[str]) -> Any:
        options["adapter_names"] = adapter_names
        return args, options

    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [names[0]]
    hooks = [
        layer.register_forward_pre_hook(partial(add_names, adapter_names=names), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for hook, layer, before in zip(hooks, layers, active, strict=True):
            hook.remove()
            layer._active_adapter = before


PARTS = ("linear layers of the base", "adapters", "attention, norms, cache", "LM head", "engine")
"""Parts of a step."""


def time_parts(engine: Engine, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each of :data:`PARTS` while ``run`` keeps the engine busy."""
    spent: Counter[str] = Counter()
    model = engine.model
    layers = engine._lora_batch.layers.values()
    hooks = [
        *_add_timers(spent, "model", [model.base_model]),
        *_add_timers(spent, "layers", layers),
        *_add_timers(spent, "base", [layer.base_layer for layer in layers]),
        *_add_timers(spent, "head", [engine._core.runner.head]),
    ]
    began = time.perf_counter()
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    total = time.perf_counter() - began
    seconds = (
        spent["base"],
        spent["layers"] - spent["base"],
        spent["model"] - spent["layers"],
        spent["head"],
        total - spent["model"] - spent["head"],
    )
    return dict(zip(PARTS, seconds, strict=True))


def _add_timers(spent: Counter[str], name: str, modules: Any) -> Iterator[RemovableHandle]:
    """Add the time of modules that do not contain each other to ``spent``."""
    began = 0.0

    def start(_module: Any, _args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def stop(_module: Any, _args: Any, _output: Any) -> None:
        spent[name] += time.perf_counter() - began  # type: ignore[assignment]

    for module in modules:
        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(stop)
