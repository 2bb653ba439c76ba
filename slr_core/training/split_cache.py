"""Attention over a key/value cache in two parts: the prompt's, and that of the positions after it.

``DynamicCache`` copies the whole cache whenever it grows, and ``sdpa`` repeats grouped keys and values for every head.
Training keeps all these copies for the backward pass. Here the prompt's keys and values stay in one tensor, which
every later pass reads; only those of the positions after it are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slr_core.loop.context import Context

NAME = "slr_split"
"""Name of :func:`attend_split` in ``transformers``."""

MAX_SCORES = 1 << 24
"""Attention scores that a pass without gradients may hold at once, in fp32."""


class Parts(NamedTuple):
    """Keys, or values, of the prompt and of the positions after it: ``[B, key heads, P or S - P, head_dim]``."""

    prompt: Tensor
    after: Tensor


class SplitLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a cache whose first positions, the prompt's, are never copied.

    Args:
        keys: of the prompt, ``[B, key heads, P, head_dim]``.
        values: the same.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prompt = keys, values
        self.after = keys[..., :0, :], values[..., :0, :]
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)

    @property
    def keys(self) -> Tensor:
        """Both parts, copied: ``[B, key heads, S, head_dim]``."""
        return torch.cat([self.prompt[0], self.after[0]], dim=-2)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        if keys is not None and keys.dim() > 1:  # `transformers` sets None and an empty tensor at first
            self.prompt, self.after = self._divided(0, keys)

    @property
    def values(self) -> Tensor:
        """Both parts, copied: ``[B, key heads, S, head_dim]``."""
        return torch.cat([self.prompt[1], self.after[1]], dim=-2)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        if values is not None and values.dim() > 1:
            self.prompt, self.after = self._divided(1, values)

    def _divided(self, which: int, tensor: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        prompt, after = list(self.prompt), list(self.after)
        length = prompt[which].shape[-2]
        prompt[which], after[which] = tensor[..., :length, :], tensor[..., length:, :]
        return (prompt[0], prompt[1]), (after[0], after[1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append positions; :class:`Parts` of keys and of values, which only :func:`attend_split` reads."""
        new = _computed(key_states), _computed(value_states)
        if self.after[0].shape[-2]:
            new = torch.cat([self.after[0], new[0]], dim=-2), torch.cat([self.after[1], new[1]], dim=-2)
        self.after = new
        return tuple(Parts(first, rest) for first, rest in zip(self.prompt, self.after, strict=True))


def split(context: Context) -> None:
    """Split the cache of a context, in place, after the positions that it has now."""
    cache = DynamicCache()
    cache.layers = [SplitLayer(_computed(keys), _computed(values)) for _, keys, values in context.layers()]
    context.cache = cache


def _computed(x: Tensor) -> Tensor:
    """In the dtype of matrix products: converted once, where autocast would do it in every pass that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def attend_split(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Parts,
    value: Tensor | Parts,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with the interface of ``transformers``; without :class:`Parts`, its ``sdpa`` attention.

    Args:
        module: the attention layer.
        query: ``[B, heads, q, head_dim]``.
        key: ``[B, key heads, S, head_dim]`` in parts.
        value: the same.
        attention_mask: ``[B, 1, q, S]`` bool.
        dropout: probability of dropping a weight.
        scaling: factor of the scores; ``None``: 1 / sqrt(head_dim).
        options: passed on to ``sdpa``.

    Returns:
        ``[B, q, heads, head_dim]``, and no attention weights.
    """
    if isinstance(key, Tensor):
        assert isinstance(value, Tensor)
        # In bfloat16 on a CPU, fused attention takes three times as long over short texts, its backward pass always.
        slow = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        short = query.shape[:-1].numel() * key.shape[-2] <= MAX_SCORES
        if attention_mask is None or not (slow and (short or query.requires_grad)):
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
            return output, None
        key, value = Parts(key, key[..., :0, :]), Parts(value, value[..., :0, :])
    assert isinstance(value, Parts)
    assert attention_mask is not None
    rows, heads, queries, width = query.shape
    key_heads, prompt = key.prompt.shape[1:3]
    # The heads that share keys and values are further queries: nothing is repeated.
    grouped = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, key_heads, -1, width)
    scores = torch.cat([grouped @ part.transpose(-1, -2) for part in key if part.shape[-2]], dim=-1)
    # Added, not filled in: that takes less than half the time. The sum of the minimum and a score is the minimum.
    bias = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(
        ~attention_mask, torch.finfo(scores.dtype).min
    )
    scores = scores.view(rows, heads, queries, -1) + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.prompt.dtype)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    weights = weights.view(rows, key_heads, -1, weights.shape[-1])
    attended = weights[..., :prompt] @ value.prompt
    if value.after.shape[-2]:
        attended = attended + weights[..., prompt:] @ value.after
    return attended.view(rows, heads, queries, width).transpose(1, 2), None


AttentionInterface.register(NAME, attend_split)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def split_attention(base: PreTrainedModel) -> Iterator[None]:
    """Inside, a model with ``sdpa`` attention uses :func:`attend_split`."""
    before = base.config._attn_implementation
    base.config._attn_implementation = NAME if before == "sdpa" else before
    try:
        yield
    finally:
        base.config._attn_implementation = before


def is_split(base: PreTrainedModel) -> bool:
    """Whether the model reads split caches now."""
    return bool(base.config._attn_implementation == NAME)
