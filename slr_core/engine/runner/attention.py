"""Attention for a pass that takes single positions and whole prompts together.

Each position is a row of the model's batch, so its linear layers see no padding and read their weights once for all;
only here does it matter which positions belong together. Registered with ``transformers`` under :data:`NAME`; without
a :class:`PackedBatch` it is ``transformers``' own ``sdpa``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slr_core.model.base_support import hidden_size

NAME = "slr_slots"


@dataclass(frozen=True)
class PackedSegment:
    """Positions that attend in one call: one each of several slots, or several of one.

    Attributes:
        own: their places in the pass.
        slots: whose columns are read.
        width: how many of them, from the first.
        mask: ``[n, 1, q, width]`` bool, for ``n`` slots.
        among: ``[m]`` long, which of the slots have a position here; ``None``: all, or there is but one slot.
    """

    own: slice
    slots: slice
    width: int
    mask: Tensor
    among: Tensor | None = None


@dataclass
class PackedBatch:
    """The parts of a pass, handed through the model to its attention.

    Attributes:
        met: attention has seen it.
    """

    parts: list[PackedSegment]
    met: bool = False


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    joint: PackedBatch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What ``transformers`` asks of attention.

    Args:
        module: the layer's.
        query: ``[n, heads, q, head_dim]``; with a ``joint`` q is 1.
        key: ``[n, key heads, S, head_dim]``; with a ``joint`` those of all slots.
        value: the same.
        attention_mask: ``[n, 1, q, S]``; not read where there is a ``joint``.
        joint: what belongs together.
        options: passed on.

    Returns:
        ``[n, q, heads, head_dim]``, and no weights.
    """
    if joint is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    joint.met = True
    output = query.new_empty(len(query), 1, query.shape[1], query.shape[3])
    for part in joint.parts:
        q, queries = query[part.own], part.mask.shape[2]
        if queries > 1:
            q = q.transpose(0, 2)
        elif part.among is not None:  # copying queries is cheaper than copying what they read
            q = q.new_zeros(len(part.mask), *q.shape[1:]).index_copy_(0, part.among, q)
        k, v = key[part.slots, :, : part.width], value[part.slots, :, : part.width]
        found, _ = sdpa_attention_forward(module, q, k, v, part.mask, **options)
        if queries > 1:
            found = found.transpose(0, 1)
        elif part.among is not None:
            found = found.index_select(0, part.among)
        output[part.own] = found
    return output, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.inference_mode()
def supports_packing(base: PreTrainedModel) -> bool:
    """Make a model use :func:`attend` and say whether it hands a :class:`PackedBatch` through to it."""
    if base.config._attn_implementation != "sdpa":
        return False
    base.set_attn_implementation(NAME)
    joint = PackedBatch([])
    x = torch.zeros(1, 1, hidden_size(base), dtype=base.dtype, device=base.device)
    base.base_model(inputs_embeds=x, use_cache=False, joint=joint)
    return joint.met
