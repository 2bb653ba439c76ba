"""Linear layers for a CPU: weights reordered for oneDNN, and quantized weights for passes of few rows.

``torch``'s plain products reorder bf16 weights at every call, and MKL's fp32 products of 2 to 64 rows take up to twice
as long as oneDNN's with reordered weights. Passes of very few rows are limited by reading the weights: there, int4 and
int8 weights are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slr_core.errors import ConfigError

Quantization = Literal["none", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "int4")

MIN_PACKED = 1 << 16
"""Fewest weights of a layer that is reordered; smaller ones stay in the processor's caches."""
GROUP = 32
"""Inputs that share a scale in int4."""
_ROW_BLOCK = 16  # the kernels' multiple of outputs
# Without the choice of an overload at every call.
_PACKED_PRODUCT = torch.ops.mkldnn._linear_pointwise.default
_INT4_PRODUCT = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class _Kernel(NamedTuple):
    """Largest number of rows for which a quantized product is faster than one in the compute dtype, by that dtype."""

    bfloat16: int
    float32: int


_MAX_ROWS = {"int8": _Kernel(1, 4), "int4": _Kernel(4, 8)}


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own order of weights. It has no gradient, and copies of it share its weights.

    Args:
        weight: ``[out, in]``, fp32 or bf16.
        bias: ``[out]``.
        reorder: reorder the weights; otherwise they are shared, and a product takes longer.
    """

    quantization: Quantization = "none"

    def __init__(self, weight: Tensor, bias: Tensor | None, *, reorder: bool = True) -> None:
        super().__init__()
        weight = weight.detach()
        if reorder:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # In a tuple: looking up a parameter of a module takes as long as a small operation.
        self._operands = self.weight.data, self.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def round(self, weight: Tensor) -> Tensor:
        """The values that this layer has in place of a weight ``[out, in]``."""
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` from ``[..., in]``."""
        weight, bias = self._operands
        y: Tensor = _PACKED_PRODUCT(x, weight, bias, "none", [], "")
        return y


class QuantizedLinear(PackedLinear):
    """A linear layer with quantized weights: group-wise int4, or int8 with a scale for each output.

    Passes of few rows multiply by the quantized weights, with inputs in bf16; others by the same values in the compute
    dtype, which are kept too.

    Args:
        weight: ``[out, in]``, fp32 or bf16; see :func:`is_quantizable`.
        bias: ``[out]``.
        quantization: ``int8`` or ``int4``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: Quantization) -> None:
        dtype = weight.dtype
        integers, scales, values = _quantizer(quantization)(weight.detach().contiguous())
        super().__init__(values.to(dtype), bias)
        self.quantization = quantization
        self.max_rows: int = getattr(_MAX_ROWS[quantization], str(dtype).removeprefix("torch."))
        if quantization == "int4":
            integers = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        self._quantized_operands = integers, scales

    def round(self, weight: Tensor) -> Tensor:
        """The values that this layer has in place of a weight ``[out, in]``."""
        return _quantizer(self.quantization)(weight.detach())[2].to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` from ``[..., in]``."""
        rows = x.shape[:-1].numel()
        if not 0 < rows <= self.max_rows:
            return super().forward(x)
        flat = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        integers, scales = self._quantized_operands
        flat = flat.reshape(rows, -1)
        y: Tensor
        if self.quantization == "int4":
            y = _INT4_PRODUCT(flat, integers, GROUP, scales)
        else:
            y = torch._weight_int8pack_mm(flat, integers, scales)
        if x.dtype != torch.bfloat16:
            y = y.to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        bias = self._operands[1]
        return y if bias is None else y + bias


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of :data:`GROUP` inputs to 16 evenly spaced values.

    Args:
        weight: ``[out, in]``.

    Returns:
        Integers 0 to 15 ``[out, in]`` int32; scales and centres ``[in / GROUP, out, 2]`` bf16; and the values that
        they stand for, ``[out, in]`` fp32.
    """
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16().float()
    centre = (low + 8 * scale).bfloat16().float()
    # In place: allocating a tensor of this size takes as long as computing it.
    levels = groups.sub(centre[..., None]).div_(scale[..., None]).add_(8).round_().clamp_(0, 15)
    integers = levels.to(torch.int32).view(outputs, inputs)
    values = levels.sub_(8).mul_(scale[..., None]).add_(centre[..., None]).view(outputs, inputs)
    scales = torch.stack([scale, centre], dim=-1).transpose(0, 1).contiguous().bfloat16()
    return integers, scales, values


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round the weights of each output to 255 evenly spaced values.

    Args:
        weight: ``[out, in]``.

    Returns:
        Integers -127 to 127 ``[out, in]`` int8; scales ``[out]`` bf16; and the values that they stand for,
        ``[out, in]`` fp32.
    """
    wide = weight.float()
    scale = (wide.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    integers = (wide / scale.float()[:, None]).round().clamp(-127, 127)
    return integers.to(torch.int8), scale, integers * scale.float()[:, None]


def _quantizer(quantization: Quantization) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    return quantize_int4 if quantization == "int4" else quantize_int8


def check_quantization(quantization: str, device: torch.device, dtype: torch.dtype) -> Quantization:
    """Return the quantization of this name.

    Raises:
        ConfigError: the name is unknown, or the device or the dtype has no quantized products.
    """
    for known in QUANTIZATIONS:
        if quantization == known:
            if known != "none" and not can_pack(device, dtype):
                raise ConfigError(
                    f"quantization {known} needs a CPU and dtype float32 or bfloat16, got {device} and "
                    f"{str(dtype).removeprefix('torch.')}"
                )
            return known
    raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization}")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    native: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return native or dtype == torch.float32


def pack_linears(base: PreTrainedModel, quantization: Quantization = "none") -> None:
    """Replace the linear layers of a base model, in place. Layers with weights that others share are left out.

    Args:
        base: the model, with or without PEFT's LoRA layers.
        quantization: how the weights are rounded; ``none``: not at all, and layers below :data:`MIN_PACKED` stay.
    """
    if not can_pack(base.device, base.dtype):
        return
    shared = {id(base.get_input_embeddings().weight)}
    for _, parent, name, layer in list(_linears(base)):
        if isinstance(layer, PackedLinear) or layer.weight.dtype != base.dtype or id(layer.weight) in shared:
            continue
        weight = _plain_weight(layer)
        is_head = layer is base.get_output_embeddings()  # type: ignore[no-untyped-call]
        if quantization != "none" and not is_head and is_quantizable(weight):
            setattr(parent, name, QuantizedLinear(weight, layer.bias, quantization))
        elif weight.numel() >= MIN_PACKED:
            setattr(parent, name, PackedLinear(weight, layer.bias))


def packed_head(base: PreTrainedModel) -> nn.Module:
    """The LM head of a base model, computed by oneDNN if other layers are.

    A tied head gets weights of its own in bf16, in which products of plain weights take twice as long; in fp32, a copy
    would cost more memory than time.
    """
    head: nn.Module = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_packed = any(isinstance(layer, PackedLinear) for layer in base.modules())
    if is_packed and type(head) is nn.Linear and head.weight.numel() >= MIN_PACKED:
        return PackedLinear(head.weight, head.bias, reorder=head.weight.dtype == torch.bfloat16)
    return head


def is_quantizable(weight: Tensor) -> bool:
    """Whether the kernels support the shape ``[out, in]``."""
    return weight.shape[0] % _ROW_BLOCK == 0 and weight.shape[1] % GROUP == 0


def share_linears(owner: PreTrainedModel, other: PreTrainedModel) -> None:
    """Replace the linear layers of ``other`` by the packed ones that ``owner`` has in their place.

    Raises:
        ConfigError: the weights of such a layer differ.
    """
    packed = {path: layer for path, _, _, layer in _linears(owner) if isinstance(layer, PackedLinear)}
    for path, parent, name, layer in list(_linears(other)):
        if path in packed:
            ours, weight = packed[path], _plain_weight(layer)
            if ours.weight.dtype != weight.dtype or not torch.equal(ours.weight.to_dense(), ours.round(weight)):
                raise ConfigError("the checkpoint's base model is not the one that is served")
            setattr(parent, name, ours)


def _linears(base: PreTrainedModel) -> Iterator[tuple[str, Any, str, Any]]:
    """Each linear layer: its path without LoRA's layers, the module that has it, and its name there."""
    for path, parent in base.named_modules():
        if isinstance(parent, LoraLayer):
            inner: Any = parent.get_base_layer()
            if isinstance(inner, nn.Linear | Conv1D | PackedLinear):
                yield path, parent, "base_layer", inner
        elif not isinstance(parent, nn.ModuleDict):  # LoRA's A and B
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear | Conv1D | PackedLinear) and not isinstance(child, LoraLayer):
                    yield f"{path}.{name}".lstrip("."), parent, name, child


def _plain_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight ``[out, in]`` of a layer."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
