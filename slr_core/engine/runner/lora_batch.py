"""All loop adapters in one batch: every row of a pass may use a different one.

A row at iteration t runs with L_t, so one linear layer applies several adapters in one batch. There are three ways to
compute the same result. :meth:`LoraBatch.tune` measures them and picks the fastest one for each layer shape:

- ``masked``: all adapters side by side, and a mask that leaves each row its own: ``mask(x A) B``. Two dense products.
- ``grouped``: rows gathered by adapter into blocks of equal size; one batched product (``bmm``) each for A and B.
- ``segments``: two products for each adapter present; its rows are gathered, unless they are next to each other.

If all rows use the same adapter, it is two plain products. Base weights are never changed.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from slr_core.errors import ConfigError
from slr_core.loop.lora import lora_layers

Method = Literal["masked", "grouped", "segments"]


class AdapterIndex:
    """The adapter of each row, in a tensor of fixed shape, so that a CUDA graph can be replayed with other ids.

    Args:
        ids: ``[n]`` long, the adapter of each row; -1: none.
        count: number of adapters.
    """

    has_adapters = True
    shared_id: int | None = None

    def __init__(self, ids: Tensor, count: int) -> None:
        self.ids, self.count = ids, count
        self._masks: dict[int, Tensor] = {}

    def other_adapters(self, rank: int) -> Tensor:
        """Mask ``[n, 1, count * rank]`` bool of the channels that belong to other adapters than the row's."""
        if rank not in self._masks:
            channel_ids = torch.arange(self.count * rank, device=self.ids.device) // rank
            self._masks[rank] = (self.ids[:, None] != channel_ids)[:, None]
        return self._masks[rank]


class AdapterGroups(AdapterIndex):
    """The adapter of each row, with the index tensors that ``grouped`` and ``segments`` need.

    Args:
        ids: the adapter of each row; ``None``: none.
        count: number of adapters.
        device: where the adapters are.

    Attributes:
        has_adapters: whether any row uses an adapter.
        shared_id: the adapter, if all rows use the same one.
        covers_all_rows: whether every row uses an adapter.
        sorted_rows: rows that use an adapter ``[m]`` long, sorted by adapter.
        segments: each adapter that is used with its rows: a slice if they are next to each other, else ``[k]`` long.
        block_size: size of the largest group.
        places: ``[m]`` long, place of each of ``sorted_rows`` in ``count`` blocks of equal size.
        sources: ``[count * block_size]`` long, the row at each place; unused places hold row 0.
        place_of_row: ``[n]`` long, in the order of rows; defined if ``covers_all_rows``.
    """

    def __init__(self, ids: Sequence[int | None], count: int, device: torch.device) -> None:
        used = [(adapter, row) for row, adapter in enumerate(ids) if adapter is not None]
        super().__init__(torch.tensor([-1 if adapter is None else adapter for adapter in ids], device=device), count)
        self.has_adapters = bool(used)
        self.shared_id = ids[0] if len(set(ids)) == 1 else None
        if not used or self.shared_id is not None:
            return
        used.sort()
        self.covers_all_rows = len(used) == len(ids)
        self.sorted_rows = torch.tensor([row for _, row in used], device=device)
        rows_of = {adapter: [row for _, row in group] for adapter, group in groupby(used, key=lambda pair: pair[0])}
        self.segments: list[tuple[int, slice | Tensor]] = [
            (
                adapter,
                slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] < len(rows) else torch.tensor(rows, device=device),
            )
            for adapter, rows in rows_of.items()
        ]
        self.block_size = max(map(len, rows_of.values()))
        places, filled = [], Counter[int]()
        for adapter, _ in used:
            places.append(adapter * self.block_size + filled[adapter])
            filled[adapter] += 1
        self.places = torch.tensor(places, device=device)
        self.sources = torch.zeros(count * self.block_size, dtype=torch.long, device=device)
        self.sources[self.places] = self.sorted_rows
        self.place_of_row = self.places[self.sorted_rows.argsort()]


class LayerWeights(NamedTuple):
    """All adapters of one layer.

    Attributes:
        down: ``[K, d_in, r]``, smaller ranks padded with zeros.
        up: ``[K, r, d_out]``, multiplied by LoRA's scale.
        flat_down: ``[d_in, K * r]``.
        flat_up: ``[K * r, d_out]``.
        pairs: ``down`` and ``up`` of each adapter.
        bias: ``[K + 1, d_out]``, what each adapter adds to the output; zeros last, for rows without an adapter;
            ``None``: no adapter has a bias.
    """

    down: Tensor
    up: Tensor
    flat_down: Tensor
    flat_up: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    bias: Tensor | None = None


_NO_WEIGHTS = LayerWeights(torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0), [])


def _stack_weights(layers: Sequence[tuple[LoraLayer | None, str]]) -> LayerWeights | None:
    """Stack one layer's adapters.

    Args:
        layers: for each adapter the layer, if the adapter's model has LoRA there, and the adapter's name.

    Returns:
        ``None`` if no adapter has an effect on this layer, as before training: their product would be zero.
    """
    pairs = [
        _scaled_weights(layer, name) if layer is not None and name in layer.lora_A else None for layer, name in layers
    ]
    present = [pair for pair in pairs if pair is not None]
    bias = _stack_biases(layers)
    if bias is None and not any(up.any() for _, up in present):
        return None
    rank = max(len(a) for a, _ in present)
    down = present[0][0].new_zeros(len(pairs), present[0][0].shape[1], rank)
    up = present[0][1].new_zeros(len(pairs), rank, present[0][1].shape[0])
    for adapter, pair in enumerate(pairs):
        if pair is not None:
            down[adapter, :, : len(pair[0])] = pair[0].T
            up[adapter, : len(pair[0])] = pair[1].T
    flat_down = down.permute(1, 0, 2).reshape(down.shape[1], -1)
    return LayerWeights(down, up, flat_down, up.view(-1, up.shape[-1]), list(zip(down, up, strict=True)), bias)


def _stack_biases(layers: Sequence[tuple[LoraLayer | None, str]]) -> Tensor | None:
    found = [None if layer is None else _scaled_bias(layer, name) for layer, name in layers]
    given = [bias for bias in found if bias is not None and bias.any()]
    if not given:
        return None
    zeros = torch.zeros_like(given[0])
    return torch.stack([*(zeros if bias is None else bias for bias in found), zeros])


class LoraBatchLinear(nn.Module):
    """A linear layer of the base model with all adapters of it.

    Attributes:
        weights: the adapters.
        has_weights: whether there are any.
        method: how batches with several adapters are computed.
    """

    def __init__(self, base_layer: nn.Module, lora_batch: LoraBatch) -> None:
        super().__init__()
        self.base_layer, self.lora_batch = base_layer, lora_batch
        self.method: Method = "masked"
        self.set_weights(None)

    def set_weights(self, weights: LayerWeights | None) -> None:
        """Replace the adapters; ``None``: no adapters."""
        self.has_weights, self.weights = weights is not None, weights or _NO_WEIGHTS

    def forward(self, x: Tensor) -> Tensor:
        """``[n, q, d_out]`` from ``[n, q, d_in]``."""
        y: Tensor = self.base_layer(x)
        index = self.lora_batch.index
        if index is None or not (index.has_adapters and self.has_weights):
            return y
        bias = self.weights.bias
        if index.shared_id is not None:
            down, up = self.weights.pairs[index.shared_id]
            y = _add_product(y, _flat(x).mm(down), up)
            return y if bias is None else y.add_(bias[index.shared_id])
        if bias is not None:
            y += bias[index.ids][:, None]  # an id of -1 is the last row
        # Only `masked` has shapes that do not depend on the ids.
        method = _METHODS[self.method] if isinstance(index, AdapterGroups) else _masked
        return method(self.weights, index, x, y)


def check_finite(base: PreTrainedModel) -> None:
    """Refuse adapters that would change rows which do not use them: zero times infinity is not zero.

    Raises:
        ConfigError: a weight, multiplied by its scale, is not finite.
    """
    for path, layer in lora_layers(base).items():
        for name in layer.lora_A:
            bias = _scaled_bias(layer, name)
            weights = (*_scaled_weights(layer, name), *(() if bias is None else (bias,)))
            if not all(weight.isfinite().all() for weight in weights):
                raise ConfigError(f"adapter {name} at {path}: its weights are not finite once they are scaled")


def _scaled_weights(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    return down.detach(), up.detach() * layer.scaling[name]


def _scaled_bias(layer: LoraLayer, name: str) -> Tensor | None:
    bias = layer.lora_B[name].bias if name in layer.lora_B else None
    assert bias is None or isinstance(bias, Tensor)
    return None if bias is None else bias.detach() * layer.scaling[name]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add_product(y: Tensor, low_rank: Tensor, up: Tensor) -> Tensor:
    """Add ``low_rank`` ``[n * q, r]`` times ``up`` to ``y`` ``[n, q, d_out]``, in place."""
    y.view(-1, y.shape[-1]).addmm_(low_rank, up)
    return y


def _masked(weights: LayerWeights, index: AdapterIndex, x: Tensor, y: Tensor) -> Tensor:
    low_rank = x @ weights.flat_down
    # Filled with zeros and not multiplied by them: an infinity of another request's adapter would become NaN.
    low_rank.masked_fill_(index.other_adapters(weights.down.shape[-1]), 0)
    return _add_product(y, _flat(low_rank), weights.flat_up)


def _grouped(weights: LayerWeights, index: AdapterIndex, x: Tensor, y: Tensor) -> Tensor:
    assert isinstance(index, AdapterGroups)
    queries = x.shape[1]
    # Not x[...], which takes three times as long.
    blocks = x.index_select(0, index.sources).view(index.count, index.block_size * queries, -1)
    delta = torch.bmm(torch.bmm(blocks, weights.down), weights.up).view(index.count * index.block_size, queries, -1)
    if index.covers_all_rows:
        return y.add_(delta.index_select(0, index.place_of_row))
    return y.index_add_(0, index.sorted_rows, delta.index_select(0, index.places))


def _segments(weights: LayerWeights, index: AdapterIndex, x: Tensor, y: Tensor) -> Tensor:
    assert isinstance(index, AdapterGroups)
    for adapter, rows in index.segments:
        down, up = weights.pairs[adapter]
        if isinstance(rows, slice):
            _add_product(y[rows], _flat(x[rows]).mm(down), up)
        else:
            y.index_add_(0, rows, (x.index_select(0, rows) @ down) @ up)
    return y


_METHODS: dict[Method, Callable[[LayerWeights, AdapterIndex, Tensor, Tensor], Tensor]] = {
    "masked": _masked,
    "grouped": _grouped,
    "segments": _segments,
}

_TIMED_LAYERS = 4
"""Layers of one shape that :meth:`LoraBatch.tune` times in turn, so that caches are cold."""
_TIMED_ROUNDS = 5


class LoraBatch:
    """A copy of a base model's structure whose linear layers apply adapters row by row. It shares all weights.

    Args:
        base: a model with PEFT's LoRA layers injected, or without any.

    Attributes:
        model: the copy.
        index: the adapters of the next pass; ``None``: no adapters.
        layers: the layers with adapters, by path.
        count: number of adapters.
        version: number of times that the adapters have changed. Their tensors are new each time.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.index: AdapterIndex | None = None
        self.layers: dict[str, LoraBatchLinear] = {}
        self.count = 0
        self.version = 0
        memo: dict[int, object] = {id(x): x for x in (*base.parameters(), *base.buffers())}
        for path, module in lora_layers(base).items():
            # PEFT's layers are replaced while the model is copied: copying their parts takes seconds.
            self.layers[path] = LoraBatchLinear(copy.deepcopy(module.get_base_layer(), memo), self)
            memo[id(module)] = self.layers[path]
        self.model: PreTrainedModel = copy.deepcopy(base, memo).eval()  # type: ignore[no-untyped-call]
        self.device = self.model.device

    def set_adapters(self, adapters: Sequence[tuple[PreTrainedModel, str]]) -> None:
        """Replace all adapters. If this fails, for lack of memory, the adapters stay as they were.

        Args:
            adapters: for each one a model with PEFT's LoRA layers, and its name; its id is its place here.
        """
        found = {id(model): lora_layers(model) for model in {id(model): model for model, _ in adapters}.values()}
        for path in {path for layers in found.values() for path in layers}:
            if path not in self.layers:
                self._replace(path, self.model.get_submodule(path))
        weights = {
            path: _stack_weights([(found[id(model)].get(path), name) for model, name in adapters])
            for path in self.layers
        }
        for path, layer in self.layers.items():
            layer.set_weights(weights[path])
        self.count = len(adapters)
        self.version += 1

    def use(self, ids: Sequence[int | None]) -> None:
        """Set the adapter of each row of the next pass; ``None``: none."""
        self.index = AdapterGroups(ids, self.count, self.device) if self.layers else None

    def _replace(self, path: str, base_layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self.layers[path] = LoraBatchLinear(base_layer, self)
        setattr(self.model.get_submodule(parent), name, self.layers[path])

    def tune(self, rows: int, queries: int) -> dict[tuple[int, int], Method]:
        """Choose the fastest method for each layer shape, measured on inputs ``[rows, queries, d_in]``.

        Returns:
            The methods chosen, by ``(d_in, d_out)``.
        """
        chosen: dict[tuple[int, int], Method] = {}
        if self.count < 2 or rows < 2:
            return chosen
        # Sorted, as the runner's rows are. Not every loop reaches later iterations: earlier ones are more frequent.
        ids = [adapter for adapter in range(self.count) for _ in range(self.count - adapter)]
        chosen_ids = [ids[row * (len(ids) - 1) // (rows - 1)] for row in range(rows)]
        mixed = AdapterGroups(chosen_ids, self.count, self.device)
        by_shape: dict[tuple[int, int], list[LoraBatchLinear]] = {}
        for layer in self.layers.values():
            if layer.has_weights:
                by_shape.setdefault((layer.weights.down.shape[1], layer.weights.up.shape[2]), []).append(layer)
        for shape, layers in by_shape.items():
            x = torch.ones(rows, queries, shape[0], dtype=layers[0].weights.down.dtype, device=self.device)
            y = torch.zeros(rows, queries, shape[1], dtype=x.dtype, device=self.device)
            best: dict[Method, float] = {}
            for _ in range(_TIMED_ROUNDS):  # interleaved, so that a busy machine slows all of them alike
                for method, compute in _METHODS.items():
                    began = time.perf_counter()
                    for layer in layers[:_TIMED_LAYERS]:
                        compute(layer.weights, mixed, x, y)
                    if y.is_cuda:
                        torch.cuda.synchronize()
                    best[method] = min(best.get(method, float("inf")), time.perf_counter() - began)
            chosen[shape] = min(best, key=best.__getitem__)
            for layer in layers:
                layer.method = chosen[shape]
        return chosen
