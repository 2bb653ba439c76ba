"""Turn a pretrained model into a recursive one (Relaxed Recursive Transformer: Bae et al., 2024, arXiv 2410.20672).

The L layers of the model become L / K shared layers that run K times. Loop t takes the place of the original layers
(t - 1) * L / K + 1 ... t * L / K, and its adapter L_t starts as what sharing loses there: the truncated singular value
decomposition of the original weights less the shared ones, for every linear layer. At full rank the loop computes what
the original computed.

Original layers also differ in parameters that are not matrices. The weight and bias of a norm are folded into the
linear layers that read it; the bias of a linear layer becomes the adapter's (``lora_bias`` in PEFT). Norms that no
linear layer reads, such as those of queries and keys in Qwen3, are shared as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slr_core.errors import ConfigError
from slr_core.loop.lora import lora_layers
from slr_core.model.base_support import find_final_norm

Start = Literal["average", "stepwise", "lower"]
"""Where shared weights start: average: the mean of the layers that they replace; stepwise: original layers at equal
distances, the first and the last among them; lower: the first layers."""

_LLAMA = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
FOLDED: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
}
"""Norms of a layer and the linear layers that alone read them, by model type."""


@dataclass(frozen=True)
class SharedLayers:
    """A model whose layers have been shared, and what that lost.

    Attributes:
        model: with the shared layers.
        layers: path of its list of layers.
        linear: names of the linear layers in a layer.
        lost: for each loop and each shared layer, the original tensors less the shared ones, fp32, by name.
        rank: largest rank that a difference can have.
        inexact: names of parameters whose differences no adapter can hold; empty: full rank is exact.
    """

    model: PreTrainedModel
    layers: str
    linear: tuple[str, ...]
    lost: list[list[dict[str, Tensor]]]
    rank: int
    inexact: tuple[str, ...]

    def adapter_configs(self, names: Iterable[str], rank: int) -> dict[str, LoraConfig]:
        """PEFT configs of the loop's adapters, which are added to the linear layers with a scale of 1."""
        biased = any(f"{module}.bias" in self.lost[0][0] for module in self.linear)
        return {
            name: LoraConfig(
                r=rank, lora_alpha=rank, target_modules="all-linear", lora_bias=biased, task_type="CAUSAL_LM"
            )
            for name in names
        }

    def start_adapters(self, names: Iterable[str]) -> None:
        """Set the adapters, once they are attached to the model, to the best approximation of what sharing lost."""
        found = lora_layers(self.model)
        for name, layers in zip(names, self.lost, strict=True):
            for index, lost in enumerate(layers):
                for module in self.linear:
                    layer, weight = found[f"{self.layers}.{index}.{module}"], lost[f"{module}.weight"]
                    down, up = layer.lora_A[name], layer.lora_B[name]
                    assert isinstance(down, nn.Linear)
                    assert isinstance(up, nn.Linear)
                    transposed = isinstance(layer.get_base_layer(), Conv1D)
                    _set_low_rank(down, up, weight.T if transposed else weight, lost.get(f"{module}.bias"))


def share_layers(base: PreTrainedModel, loops: int, start: Start) -> SharedLayers:
    """Share the layers of ``base`` between ``loops`` passes; it is changed in place.

    Raises:
        ConfigError: the number of layers is not a multiple of ``loops``, or the architecture is not supported.
    """
    kind = base.config.model_type
    if kind not in FOLDED or getattr(base.config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(f"a recursive model can be made of {', '.join(sorted(FOLDED))}, not of this {kind}")
    path, layers = _find_layers(base)
    if loops < 2 or len(layers) % loops:
        raise ConfigError(f"the number of loops must be above 1 and divide the {len(layers)} layers, got {loops}")
    count = len(layers) // loops
    kinds = getattr(base.config, "layer_types", None)
    if kinds and any(kinds[i] != kinds[i % count] for i in range(len(layers))):
        raise ConfigError(f"layers with full and with sliding attention would be shared in {loops} loops")
    with torch.no_grad():
        tensors = [_folded(layer, FOLDED[kind]) for layer in layers]
        shared = [_shared(tensors, index, loops, start) for index in range(count)]
        for layer, state in zip(layers, shared, strict=False):
            layer.load_state_dict(state)  # rounds to the model's dtype
        shared = [
            {key: x.to(torch.float32, copy=True) for key, x in layer.state_dict().items()} for layer in layers[:count]
        ]
    lost = [
        [{key: x - shared[i][key] for key, x in tensors[loop * count + i].items()} for i in range(count)]
        for loop in range(loops)
    ]
    del layers[count:]
    base.config.num_hidden_layers = count
    if kinds:
        base.config.layer_types = list(kinds[:count])
    linear = tuple(name for name, module in layers[0].named_modules() if isinstance(module, nn.Linear | Conv1D))
    others = [key for key in lost[0][0] if key.rpartition(".")[0] not in linear]
    return SharedLayers(
        model=base,
        layers=path,
        linear=linear,
        lost=lost,
        rank=max(min(lost[0][0][f"{name}.weight"].shape) for name in linear),
        inexact=tuple(key for key in others if any(layer[key].any() for loop in lost for layer in loop)),
    )


def _find_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    find_final_norm(base)
    for name in ("layers", "h"):
        found = getattr(base.base_model, name, None)
        if isinstance(found, nn.ModuleList):
            return f"{base.base_model_prefix}.{name}", found
    raise ConfigError(f"{type(base).__name__}: no list of layers is known for this model")


def _folded(layer: nn.Module, norms: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """A layer's tensors in fp32, with its norms folded into the linear layers that read them."""
    state = {key: x.to(torch.float32, copy=True) for key, x in layer.state_dict().items()}
    for norm, readers in norms.items():
        scale, shift = state[f"{norm}.weight"], state.get(f"{norm}.bias")
        for reader in readers:
            weight = state[f"{reader}.weight"]
            transposed = isinstance(layer.get_submodule(reader), Conv1D)  # [in, out]
            if shift is not None:
                state[f"{reader}.bias"] = state[f"{reader}.bias"] + (shift @ weight if transposed else weight @ shift)
            state[f"{reader}.weight"] = weight * (scale[:, None] if transposed else scale)
        state[f"{norm}.weight"] = torch.ones_like(scale)
        if shift is not None:
            state[f"{norm}.bias"] = torch.zeros_like(shift)
    return state


def _shared(tensors: list[dict[str, Tensor]], index: int, loops: int, start: Start) -> dict[str, Tensor]:
    """The tensors of shared layer ``index``."""
    count = len(tensors) // loops
    if start == "average":
        return {key: torch.stack([layer[key] for layer in tensors[index::count]]).mean(0) for key in tensors[0]}
    if start == "stepwise" and count > 1:
        index = round(index * (len(tensors) - 1) / (count - 1))
    return tensors[index]


def _set_low_rank(down: nn.Linear, up: nn.Linear, lost: Tensor, lost_bias: Tensor | None) -> None:
    """Set the product of ``up`` and ``down`` to the best approximation of ``lost`` ``[out, in]``.

    Where the rank is above that of ``lost``, the rest of ``down`` keeps its random start and that of ``up`` is zero.
    """
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    kept = min(down.out_features, len(values))
    root = values[:kept].sqrt()
    with torch.no_grad():
        up.weight.zero_()
        up.weight[:, :kept] = left[:, :kept] * root
        down.weight[:kept] = root[:, None] * right[:kept]
        if up.bias is not None:
            up.bias.copy_(torch.zeros_like(up.bias) if lost_bias is None else lost_bias)
