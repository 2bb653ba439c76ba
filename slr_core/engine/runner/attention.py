"""Attention of packed batches.

In a packed batch every position is a row of its own: linear layers see no padding and read their weights once for all
rows, and only attention needs to know which rows belong together. :func:`attend` is registered with ``transformers``
under :data:`NAME`; without a :class:`PackedBatch` it is the ``sdpa`` attention of ``transformers``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slr_core.engine.runner.packing import PackedBatch
from slr_core.model.base_support import hidden_size

NAME = "slr_slots"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedBatch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with the interface of ``transformers``.

    Args:
        module: the attention layer.
        query: ``[n, heads, q, head_dim]``; q is 1 in a packed batch.
        key: ``[n, key heads, S, head_dim]``; in a packed batch those of all slots.
        value: the same.
        attention_mask: ``[n, 1, q, S]``; ignored in a packed batch.
        packed: which rows belong together; ``None``: the batch is not packed.
        options: passed on.

    Returns:
        ``[n, q, heads, head_dim]``, and no attention weights.
    """
    if packed is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    packed.reached_attention = True
    output = query.new_empty(len(query), 1, query.shape[1], query.shape[3])
    for segment in packed.segments:
        q, queries = query[segment.rows], segment.mask.shape[2]
        if queries > 1:
            q = q.transpose(0, 2)
        elif segment.active_slots is not None:  # copying queries is cheaper than copying keys and values
            q = q.new_zeros(len(segment.mask), *q.shape[1:]).index_copy_(0, segment.active_slots, q)
        k, v = segment.source.read(key, value)
        attended, _ = sdpa_attention_forward(module, q, k, v, segment.mask, **options)
        if queries > 1:
            attended = attended.transpose(0, 1)
        elif segment.active_slots is not None:
            attended = attended.index_select(0, segment.active_slots)
        output[segment.rows] = attended
    return output, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.inference_mode()
def enable_packing(base: PreTrainedModel) -> bool:
    """Make a model use :func:`attend`.

    Returns:
        Whether the model passes a :class:`PackedBatch` through to it.
    """
    if base.config._attn_implementation != "sdpa":
        return False
    base.set_attn_implementation(NAME)
    packed = PackedBatch([])
    x = torch.zeros(1, 1, hidden_size(base), dtype=base.dtype, device=base.device)
    base.base_model(inputs_embeds=x, use_cache=False, packed=packed)
    return packed.reached_attention
