"""Mixed precision: when it is the default, and frozen weights in bfloat16 beside the unchanged ones.

``torch.autocast`` converts a frozen weight anew in every pass, and the backward pass keeps each of these copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

LARGE = 50_000_000
"""Number of parameters from which matrix products take most of a training step."""


def prefers_bfloat16(base: nn.Module) -> bool:
    """Whether mixed precision is faster: the model is large, and the device computes bfloat16 natively."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and sum(parameter.numel() for parameter in base.parameters()) >= LARGE


class FrozenCopies:
    """Copies in bfloat16 of the frozen weights of a model's linear layers.

    Args:
        model: its linear layers whose weights are frozen and in fp32 get a copy. The layers must stay frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self._copies = [
            (layer, nn.Parameter(layer.weight.detach().to(torch.bfloat16), requires_grad=False))
            for layer in model.modules()
            if isinstance(layer, nn.Linear | Conv1D)
            and not layer.weight.requires_grad
            and layer.weight.dtype == torch.float32
        ]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Inside, the layers have their copies for weights, and PEFT leaves the dtype of inputs to autocast."""
        originals = [(layer, layer.weight) for layer, _ in self._copies]
        try:
            for adapted in self._adapted:
                adapted.cast_input_dtype_enabled = False  # else the backward pass keeps a further copy of each input
            for layer, copy in self._copies:
                layer.weight = copy
            yield
        finally:
            for adapted in self._adapted:
                adapted.cast_input_dtype_enabled = True
            for layer, weight in originals:
                layer.weight = weight
