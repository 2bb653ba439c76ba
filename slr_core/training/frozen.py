"""Mixed precision: when it is the default, and frozen weights in bfloat16 beside the unchanged ones.

``torch.autocast`` converts a frozen weight anew in every pass, and the backward pass keeps each of these copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LARGE = 50_000_000
"""Number of parameters from which matrix products take most of a training step."""

MIN_REORDERED = 1 << 16
"""Fewest weights of a layer that is reordered."""


def prefers_bfloat16(base: nn.Module) -> bool:
    """Whether mixed precision is faster: the model is large, and the device computes bfloat16 natively."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and sum(parameter.numel() for parameter in base.parameters()) >= LARGE


class FrozenCopies:
    """Copies in bfloat16 of the frozen weights of a model's linear layers.

    On a CPU that computes bfloat16 natively, large layers without a bias get two copies in oneDNN's own order of
    weights, for the forward and the backward pass: ``torch`` would reorder them in every pass.

    Args:
        model: its linear layers whose weights are frozen and in fp32 get a copy. The layers must stay frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self._rotary = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        self._input: tuple[Tensor, Tensor, bool] | None = None
        self._copies: list[tuple[nn.Linear | Conv1D, nn.Parameter]] = []
        self._products: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []
        for layer in model.modules():
            if (
                not isinstance(layer, nn.Linear | Conv1D)
                or layer.weight.requires_grad
                or layer.weight.dtype != torch.float32
            ):
                continue
            weight = layer.weight.detach().to(torch.bfloat16)
            if _can_reorder(layer):
                self._products.append((layer, partial(self._multiply, _reorder(weight), _reorder(weight.t()))))
            else:
                self._copies.append((layer, nn.Parameter(weight, requires_grad=False)))

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, the layers compute with their copies, and PEFT leaves the dtype of inputs to autocast.

        Rotary embeddings are in bfloat16, as the queries and keys are that they turn.
        """
        originals = [(layer, layer.weight) for layer, _ in self._copies]
        hooks = [module.register_forward_hook(_half) for module in self._rotary]
        try:
            for adapted in self._adapted:
                adapted.cast_input_dtype_enabled = False  # else the backward pass keeps a further copy of each input
            for layer, copy in self._copies:
                layer.weight = copy
            for linear, product in self._products:
                linear.forward = product  # type: ignore[method-assign, assignment]
            yield
        finally:
            for adapted in self._adapted:
                adapted.cast_input_dtype_enabled = True
            for layer, weight in originals:
                layer.weight = weight
            for linear, _ in self._products:
                del linear.forward
            for hook in hooks:
                hook.remove()
            self._input = None

    def _multiply(self, weight: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        # Queries, keys and values have one input, and so have the gate and what it gates: it is converted once.
        tracked = torch.is_grad_enabled()
        if self._input is None or self._input[0] is not x or self._input[2] != tracked:
            self._input = x, x.to(torch.bfloat16), tracked
        product: Tensor = _Product.apply(self._input[1], weight, transposed)  # type: ignore[no-untyped-call]
        return product


def _can_reorder(layer: nn.Linear | Conv1D) -> TypeGuard[nn.Linear]:
    if type(layer) is not nn.Linear or layer.bias is not None or layer.weight.numel() < MIN_REORDERED:
        return False
    return layer.weight.device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _reorder(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return reordered


class _Product(torch.autograd.Function):
    """``x W^T`` in bfloat16, of reordered weights W ``[out, in]`` and W^T, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise(grad, ctx.transposed, None, "none", [], ""), None, None


def _half(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.bfloat16) for x in output)
