"""Merge a LoRA adapter into the weights that it changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slr_core.checkpoint.validate import checkpoint_error


def split_lora(tensors: Mapping[str, Tensor], suffix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights without PEFT's names for them, and the adapter's tensors, named ``LAYER.lora_A`` and ``LAYER.lora_B``.

    Args:
        tensors: of a model that PEFT has wrapped.
        suffix: what follows ``lora_A`` and ``lora_B`` in their names.
    """
    plain, lora = {}, {}
    for name, tensor in tensors.items():
        layer, found, part = name.removesuffix(suffix).rpartition(".lora_")
        if found and name.endswith(suffix):
            lora[f"{layer}.lora_{part}"] = tensor
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain, lora


def adapter_settings(
    where: Path, weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], alpha: float
) -> dict[str, Any]:
    """Settings of the loop's LoRA for an adapter that is kept and acts in every pass.

    Raises:
        CheckpointError: half of a pair is missing, a layer does not exist, or the ranks differ.
    """
    layers = {name.rpartition(".")[0] for name in lora}
    for layer in sorted(layers):
        if not {f"{layer}.lora_A", f"{layer}.lora_B"} <= lora.keys() or f"{layer}.weight" not in weights:
            raise checkpoint_error(where, f"the adapter of {layer} is incomplete, or the base has no such layer")
    ranks = {len(lora[f"{layer}.lora_A"]) for layer in layers}
    if len(ranks) > 1:
        raise checkpoint_error(where, f"its adapter has the ranks {sorted(ranks)}; one that is kept must have one rank")
    targets = sorted({layer.rpartition(".")[2] for layer in layers})
    return {"kind": "shared", "covers": "all", "rank": ranks.pop(), "alpha": alpha, "target_modules": targets}


def merge_lora(
    where: Path,
    weights: dict[str, Tensor],
    lora: Mapping[str, Tensor],
    *,
    alpha: float,
    transposed: Collection[str],
    dtype: torch.dtype,
) -> None:
    """Add ``alpha / r * B A`` to every weight that has an adapter, in float64; ``weights`` is changed in place.

    Args:
        where: names the checkpoint in messages.
        weights: of the base model.
        lora: the adapter, as :func:`split_lora` names it.
        alpha: of the adapter.
        transposed: names of layers that store their weight transposed.
        dtype: of the merged weights.

    Raises:
        CheckpointError: half of a pair is missing, a layer does not exist, or the shapes do not fit.
    """
    layers = {name.rpartition(".")[0] for name in lora}
    for layer in sorted(layers):
        a, b, weight = lora.get(f"{layer}.lora_A"), lora.get(f"{layer}.lora_B"), weights.get(f"{layer}.weight")
        if a is None or b is None or weight is None:
            raise checkpoint_error(where, f"the adapter of {layer} is incomplete, or the base has no such layer")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise checkpoint_error(where, f"the adapter of {layer} has shapes {list(a.shape)} and {list(b.shape)}")
        change = alpha / len(a) * (b.double() @ a.double())
        change = change.T if layer in transposed else change
        if change.shape != weight.shape:
            raise checkpoint_error(
                where, f"the adapter of {layer} is for a weight of shape {list(change.shape)}, not {list(weight.shape)}"
            )
        weights[f"{layer}.weight"] = (weight.double() + change).to(dtype)
