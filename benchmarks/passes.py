"""ModelRunner of the base model without the engine, PEFT's way of mixing adapters, and where a pass's time goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from slr_core.engine import Engine
from slr_core.engine.runner.attention import Part
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.model.base_support import hidden_size


@dataclass(frozen=True)
class ModelRunner:
    """What an engine ran.

    Attributes:
        shapes: rows, positions and columns of each pass.
        apart: the same, but single positions and prompts of each length class in passes of their own, as a model
            without the engine would have to run them.
        heads: rows read by the head, each time.
    """

    shapes: list[tuple[int, int, int]]
    apart: list[tuple[int, int, int]]
    heads: list[int]


@contextmanager
def recorded(engine: Engine) -> Iterator[ModelRunner]:
    """Note every pass inside the block."""
    passes = ModelRunner([], [], [])

    def note(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        rows, queries, _ = options["inputs_embeds"].shape
        joint = options.get("joint")
        if joint is None:
            passes.shapes.append((rows, queries, options["attention_mask"].shape[-1]))
            passes.apart.append(passes.shapes[-1])
            return
        passes.shapes.append((rows, 1, max(part.width for part in joint.parts)))
        classes: dict[int, list[Part]] = {}
        for part in joint.parts:
            classes.setdefault((part.mask.shape[2] - 1).bit_length(), []).append(part)
        for parts in classes.values():
            length, columns = max(part.mask.shape[2] for part in parts), max(part.width for part in parts)
            own = sum(part.own.stop - part.own.start for part in parts) if length == 1 else len(parts)
            passes.apart.append((own, length, columns))

    def note_head(_module: Any, args: tuple[torch.Tensor]) -> None:
        passes.heads.append(len(args[0]))

    hooks = [
        engine.model.base_model.register_forward_pre_hook(note, with_kwargs=True),
        engine.model.get_output_embeddings().register_forward_pre_hook(note_head),  # type: ignore[no-untyped-call]
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def bare(engine: Engine, shapes: list[tuple[int, int, int]], heads: list[int], cache: KVCache) -> None:
    """ModelRunner of these shapes by the base model alone, over a cache of as many rows as the largest has."""
    engine._bank.rows = None  # the engine is idle: its model runs without adapters
    for rows, queries, columns in shapes:
        forward(engine.model, cache, rows, queries, columns)
    head = engine.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for rows in heads:
        head(torch.zeros(rows, hidden_size(engine.model)))


def forward(model: Any, cache: KVCache, rows: int, queries: int, columns: int) -> None:
    """One pass whose rows read so many columns of a cache that nothing copies."""
    at = torch.arange(columns - queries, columns).expand(rows, queries)
    cache.bind(range(rows), at, columns)
    model.base_model(
        inputs_embeds=torch.ones(rows, queries, hidden_size(model)),
        attention_mask=(torch.arange(columns) <= at[..., None])[:, None],
        position_ids=at,
        past_key_values=cache,
        use_cache=True,
    )


@contextmanager
def mixed_by_peft(base: nn.Module, names: list[str]) -> Iterator[None]:
    """PEFT's mixed batch: what ``adapter_names`` does in a PeftModel, for adapters that were injected."""

    def hand_over(_module: Any, args: Any, options: dict[str, Any], adapter_names: list[str]) -> Any:
        options["adapter_names"] = adapter_names
        return args, options

    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [names[0]]
    hooks = [
        layer.register_forward_pre_hook(partial(hand_over, adapter_names=names), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for hook, layer, before in zip(hooks, layers, active, strict=True):
            hook.remove()
            layer._active_adapter = before


PARTS = ("the base's linear layers", "adapters", "attention, norms, cache", "the head", "the engine")
"""Of a step."""


def parts(engine: Engine, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each of :data:`PARTS` while ``run`` keeps the engine busy."""
    spent: Counter[str] = Counter()
    model = engine.model
    layers = engine._bank.layers.values()
    hooks = [
        *_timed(spent, "model", [model.base_model]),
        *_timed(spent, "layers", layers),
        *_timed(spent, "base", [layer.base_layer for layer in layers]),
        *_timed(spent, "head", [model.get_output_embeddings()]),  # type: ignore[no-untyped-call]
    ]
    began = time.perf_counter()
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    all_of_it = time.perf_counter() - began
    own = (
        spent["base"],
        spent["layers"] - spent["base"],
        spent["model"] - spent["layers"],
        spent["head"],
        all_of_it - spent["model"] - spent["head"],
    )
    return dict(zip(PARTS, own, strict=True))


def _timed(spent: Counter[str], name: str, modules: Any) -> Iterator[RemovableHandle]:
    """Add the time in modules that do not hold each other to ``spent``."""
    began = 0.0

    def start(_module: Any, _args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def stop(_module: Any, _args: Any, _output: Any) -> None:
        spent[name] += time.perf_counter() - began  # type: ignore[assignment]

    for module in modules:
        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(stop)
