"""The last layer of a prompt's pass, at the one position of each row that is read.

The loop reads the keys and values of all layers at all positions of the prompt, but the state at its last position
alone. What the last layer computes elsewhere after its keys and values, is read by nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def last_positions_alone(base: PreTrainedModel, present: Tensor) -> Iterator[None]:
    """Inside, the last layer's queries, output projection and MLP are 0 but at each row's last position.

    Other layers than those of Llama and its like compute everything, and so do passes that keep a graph.

    Args:
        base: the model.
        present: ``[B, L]`` bool, the positions of the one pass inside that are not padding.
    """
    layers = getattr(base.base_model, "layers", None)
    parts = [] if layers is None else _position_wise(layers[-1])
    rows = torch.arange(len(present), device=present.device)
    last = present.shape[1] - 1 - present.flip(1).long().argmax(1)
    before = [(part, vars(part).get("forward")) for part in parts]
    try:
        for part in parts:
            part.forward = _at(part.forward, rows, last)
        yield
    finally:
        for part, forward in before:
            if forward is None:
                vars(part).pop("forward", None)
            else:
                part.forward = forward


def _position_wise(layer: nn.Module) -> list[Any]:
    attention = getattr(layer, "self_attn", None)
    parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(layer, "mlp", None)]
    return parts if all(isinstance(part, nn.Module) for part in parts) else []


def _at(forward: Callable[[Tensor], Tensor], rows: Tensor, last: Tensor) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        if x.requires_grad:
            return forward(x)
        y = forward(x[rows, last][:, None])
        if y.requires_grad:
            return forward(x)
        spread = y.new_zeros(*x.shape[:-1], y.shape[-1])
        spread[rows, last] = y[:, 0]
        return spread

    return compute
