"""The adapter bank: every loop adapter at hand, another one for each row of a pass.

A row at iteration t runs with L_t, so one linear layer sees several adapters in one batch. Three ways to
compute the same, of which :func:`tune` picks the fastest for each layer shape by measurement:

- ``masked``: all adapters side by side, and a mask that leaves each row its own: ``mask(x A) B``. Two dense
  products, whatever the mix.
- ``grouped``: rows gathered by adapter into blocks of equal size, one batched product (``bmm``) each for A and B.
- ``segments``: rows sorted by adapter, two products for each adapter present.

Where all rows share an adapter, it is two plain products. Base weights are never touched.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from slr_core.errors import ConfigError

Method = Literal["masked", "grouped", "segments"]


class AdapterIndex:
    """Which adapter each row of a pass uses, told by a tensor alone: another mix is another content of it.

    Args:
        owner: ``[n]`` long, the place in the bank for each row; -1: no adapter.
        count: adapters in the bank.
    """

    any = True
    shared: int | None = None

    def __init__(self, owner: Tensor, count: int) -> None:
        self.owner, self.count = owner, count
        self._foreign: dict[int, Tensor] = {}

    def foreign(self, rank: int) -> Tensor:
        """``[n, 1, count * rank]`` bool: false where a row's own adapter lies."""
        if rank not in self._foreign:
            owners = torch.arange(self.count * rank, device=self.owner.device) // rank
            self._foreign[rank] = (self.owner[:, None] != owners)[:, None]
        return self._foreign[rank]


class AdapterGroups(AdapterIndex):
    """Which adapter each row of a pass uses, and what the three ways need to know of that.

    Args:
        adapters: the place in the bank for each row; ``None``: no adapter.
        count: adapters in the bank.
        device: where the bank lies.
    """

    def __init__(self, adapters: Sequence[int | None], count: int, device: torch.device) -> None:
        used = [(adapter, row) for row, adapter in enumerate(adapters) if adapter is not None]
        owners = [-1 if adapter is None else adapter for adapter in adapters]
        super().__init__(torch.tensor(owners, device=device), count)
        self.any = bool(used)
        self.shared = adapters[0] if len(set(adapters)) == 1 else None
        if not used or self.shared is not None:
            return
        used.sort()
        self.whole = len(used) == len(adapters)
        self.order = torch.tensor([row for _, row in used], device=device)
        self.sizes = Counter(adapter for adapter, _ in used)
        # Each used row's place in blocks of equal size, one block an adapter.
        self.block = max(self.sizes.values())
        places, filled = [], Counter[int]()
        for adapter, _ in used:
            places.append(adapter * self.block + filled[adapter])
            filled[adapter] += 1
        self.places = torch.tensor(places, device=device)
        self.sources = torch.zeros(count * self.block, dtype=torch.long, device=device)
        self.sources[self.places] = self.order
        # The other way round, in the order of rows; only where all of them are in the blocks.
        self.found = self.places[self.order.argsort()]


class _Held(NamedTuple):
    """A layer's adapters, as :class:`LoraBatchLinear` describes them."""

    down: Tensor
    up: Tensor
    flat_down: Tensor
    flat_up: Tensor
    each: list[tuple[Tensor, Tensor]]


_NOTHING = _Held(torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0), [])


def _held(layers: Sequence[tuple[nn.Module, str]]) -> _Held | None:
    """For each place in the bank a layer, with or without PEFT's LoRA, and a name on it; ``None``: no adapter acts."""
    pairs = [
        _weights(layer, name) if isinstance(layer, LoraLayer) and name in layer.lora_A else None
        for layer, name in layers
    ]
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    rank = max(len(a) for a, _ in present)
    down = present[0][0].new_zeros(len(pairs), present[0][0].shape[1], rank)
    up = present[0][1].new_zeros(len(pairs), rank, present[0][1].shape[0])
    for place, pair in enumerate(pairs):
        if pair is not None:
            down[place, :, : len(pair[0])] = pair[0].T
            up[place, : len(pair[0])] = pair[1].T
    flat_down = down.permute(1, 0, 2).reshape(down.shape[1], -1)
    return _Held(down, up, flat_down, up.view(-1, up.shape[-1]), list(zip(down, up, strict=True)))


class LoraBatchLinear(nn.Module):
    """A linear layer of the base with the bank's adapters for it.

    Attributes:
        down: ``[K, d_in, r]``, ranks padded with zeros to the largest.
        up: ``[K, r, d_out]``, LoRA's scale folded in.
        each: both of one adapter, by its place.
        method: how mixed batches are computed.
    """

    def __init__(self, base_layer: nn.Module, bank: LoraBatch) -> None:
        super().__init__()
        self.base_layer, self.bank = base_layer, bank
        self.method: Method = "masked"
        self.hold(None)

    def hold(self, held: _Held | None) -> None:
        """Use these adapters from now on, or none."""
        self.acts = held is not None
        self.down, self.up, self.flat_down, self.flat_up, self.each = held or _NOTHING

    def forward(self, x: Tensor) -> Tensor:
        """``[n, q, d_in]`` or, from GPT-2's own linear layers, the same: ``[n, q, d_out]``."""
        y: Tensor = self.base_layer(x)
        rows = self.bank.rows
        if rows is None or not (rows.any and self.acts):
            return y
        if rows.shared is not None:
            down, up = self.each[rows.shared]
            return _added(y, _flat(x).mm(down), up)
        # The other two ways have shapes that depend on the mix.
        return _METHODS[self.method](self, rows, x, y) if isinstance(rows, AdapterGroups) else _masked(self, rows, x, y)


def check_finite(base: PreTrainedModel) -> None:
    """Refuse adapters that would be felt by rows which do not use them: zero times infinity is not zero.

    Raises:
        ConfigError: a weight, scaled as it is used, is not finite.
    """
    for path, layer in base.named_modules():
        for name in layer.lora_A if isinstance(layer, LoraLayer) else ():
            if not all(weight.isfinite().all() for weight in _weights(layer, name)):
                raise ConfigError(f"adapter {name} at {path}: its weights are not finite once they are scaled")


def _weights(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    return down.detach(), up.detach() * layer.scaling[name]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _added(y: Tensor, shrunk: Tensor, up: Tensor) -> Tensor:
    """``y`` ``[n, q, d_out]`` after ``shrunk`` ``[n * q, r]`` times ``up`` is added to it, in one go."""
    y.view(-1, y.shape[-1]).addmm_(shrunk, up)
    return y


def _masked(layer: LoraBatchLinear, rows: AdapterIndex, x: Tensor, y: Tensor) -> Tensor:
    shrunk = x @ layer.flat_down
    # Not multiplied by zeros: what another request's adapter made infinite would become NaN here.
    return _added(y, _flat(shrunk.masked_fill_(rows.foreign(layer.down.shape[-1]), 0)), layer.flat_up)


def _grouped(layer: LoraBatchLinear, rows: AdapterGroups, x: Tensor, y: Tensor) -> Tensor:
    queries = x.shape[1]
    # Not x[...], which takes three times as long.
    blocks = x.index_select(0, rows.sources).view(rows.count, rows.block * queries, -1)
    delta = torch.bmm(torch.bmm(blocks, layer.down), layer.up).view(rows.count * rows.block, queries, -1)
    if rows.whole:
        return y.add_(delta.index_select(0, rows.found))
    return y.index_add_(0, rows.order, delta.index_select(0, rows.places))


def _segments(layer: LoraBatchLinear, rows: AdapterGroups, x: Tensor, y: Tensor) -> Tensor:
    start = 0
    for adapter in sorted(rows.sizes):
        mine = rows.order[start : start + rows.sizes[adapter]]
        start += len(mine)
        down, up = layer.each[adapter]
        y.index_add_(0, mine, (x.index_select(0, mine) @ down) @ up)
    return y


_METHODS: dict[Method, Callable[[LoraBatchLinear, AdapterGroups, Tensor, Tensor], Tensor]] = {
    "masked": _masked,
    "grouped": _grouped,
    "segments": _segments,
}

_MEASURED = 4  # layers of a shape: in a pass no layer finds its adapters where the same one has just left them


class LoraBatch:
    """A copy of a base model's structure whose linear layers read the bank. All weights are shared with the base.

    Args:
        base: a model with PEFT's LoRA layers injected, or without any.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        memo: dict[int, object] = {id(x): x for x in (*base.parameters(), *base.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(base, memo).eval()  # type: ignore[no-untyped-call]
        self.device = self.model.device
        self.rows: AdapterIndex | None = None
        self.layers: dict[str, LoraBatchLinear] = {}
        for path, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                self._replace(path, module.get_base_layer())

    def fill(self, adapters: Sequence[tuple[PreTrainedModel, str]]) -> None:
        """Hold these adapters from now on: a model that PEFT injected them into, and a name, for each place.

        Where that fails, for want of memory, the bank holds what it held before.
        """
        for path in {p for model, _ in adapters for p, m in model.named_modules() if isinstance(m, LoraLayer)}:
            if path not in self.layers:
                self._replace(path, self.model.get_submodule(path))
        held = {path: _held([(model.get_submodule(path), name) for model, name in adapters]) for path in self.layers}
        for path, layer in self.layers.items():
            layer.hold(held[path])
        self.count = len(adapters)
        self.fillings += 1

    count = 0
    """Adapters at hand."""
    fillings = 0
    """How often that has changed: their tensors are others then."""

    def use(self, adapters: Sequence[int | None]) -> None:
        """Say which adapter each row of the next pass uses."""
        self.rows = AdapterGroups(adapters, self.count, self.device) if self.layers else None

    def _replace(self, path: str, base_layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self.layers[path] = LoraBatchLinear(base_layer, self)
        setattr(self.model.get_submodule(parent), name, self.layers[path])

    def tune(self, rows: int, queries: int, rounds: int = 5) -> dict[tuple[int, int], Method]:
        """Choose the fastest way for each layer shape, measured on inputs ``[rows, queries, d_in]``.

        Returns:
            What was chosen, by ``(d_in, d_out)``.
        """
        chosen: dict[tuple[int, int], Method] = {}
        if self.count < 2 or rows < 2:
            return chosen
        mixed = AdapterGroups([row % self.count for row in range(rows)], self.count, self.device)
        alike: dict[tuple[int, int], list[LoraBatchLinear]] = {}
        for layer in self.layers.values():
            if layer.acts:
                alike.setdefault((layer.down.shape[1], layer.up.shape[2]), []).append(layer)
        for shape, layers in alike.items():
            x = torch.ones(rows, queries, shape[0], dtype=layers[0].down.dtype, device=self.device)
            y = torch.zeros(rows, queries, shape[1], dtype=x.dtype, device=self.device)
            best: dict[Method, float] = {}
            for _ in range(rounds):  # interleaved: a noisy machine is noisy for all of them
                for method, compute in _METHODS.items():
                    began = time.perf_counter()
                    for layer in layers[:_MEASURED]:
                        compute(layer, mixed, x, y)
                    if y.is_cuda:
                        torch.cuda.synchronize()
                    best[method] = min(best.get(method, float("inf")), time.perf_counter() - began)
            chosen[shape] = min(best, key=best.__getitem__)
            for layer in layers:
                layer.method = chosen[shape]
        return chosen
