"""Means of losses, and the cross-entropy of tokens: from logits, or from states without keeping logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slr_core.model.looped import IGNORE
from slr_core.reasoner import LatentReasoner

_ROWS = 256  # states whose logits exist at the same time


class Mean(NamedTuple):
    """Total and divisor of a mean, kept apart so that devices can add up their divisors: fp32 scalars."""

    total: Tensor
    divisor: Tensor

    @property
    def value(self) -> Tensor:
        """The mean; 0 if the divisor is 0."""
        return self.total / self.divisor.clamp_min(1)


def mean_of(values: Tensor, mask: Tensor) -> Mean:
    """Mean of ``values`` where ``mask`` (bool, the same shape) is true."""
    # Not a product: masked values may be infinite, and 0 * inf is NaN.
    return Mean(values.masked_fill(~mask, 0).sum(), mask.sum())


def token_loss(logits: Tensor, labels: Tensor) -> Mean:
    """Cross-entropy per token: logits ``[..., V]``, labels ``[...]``, where -100 is ignored."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return mean_of(losses, labels.flatten() != IGNORE)


def state_loss(reasoner: LatentReasoner, states: Tensor, labels: Tensor) -> Mean:
    """Cross-entropy per token, read by the LM head at states ``[..., d]``; labels ``[...]``, where -100 is ignored.

    The head reads only states with a label. Their logits, which are much larger than states, are not kept for the
    backward pass.
    """
    counted = labels != IGNORE
    states, labels = reasoner.normed(states)[counted], labels[counted]
    head: nn.Module = reasoner.base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear or head.bias is not None:
        return token_loss(head(states), labels)
    total: Tensor = _HeadCrossEntropy.apply(states, head.weight, labels, head)
    return Mean(total, counted.sum())


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of states ``[N, d]``, the weight ``[V, d]`` of a linear head, labels ``[N]`` and the head.

    The gradients are computed in the forward pass, for a few states at a time. The head is called as a module, so that
    a frozen one multiplies by its copies in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
        total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        needed = [i for i in (0, 1) if ctx.needs_input_grad[i]]
        state_grads = torch.empty_like(states) if 0 in needed else None
        weight_grad = torch.zeros_like(weight, dtype=total.dtype) if 1 in needed else None
        for start in range(0, len(states), _ROWS):
            rows = slice(start, start + _ROWS)
            with torch.enable_grad():
                some = states[rows].detach().requires_grad_(0 in needed)
                logits = head(some)
            wanted = labels[rows, None]
            log_probs = logits.detach().to(total.dtype).log_softmax(-1)
            total -= log_probs.gather(1, wanted).sum()
            if not needed:
                continue
            grads = log_probs.exp_()
            grads.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=grads.dtype))
            inputs = [(some, weight)[i] for i in needed]
            found = dict(zip(needed, torch.autograd.grad(logits, inputs, grads.to(logits.dtype)), strict=True))
            if state_grads is not None:
                state_grads[rows] = found[0]
            if weight_grad is not None:
                weight_grad += found[1]
        ctx.gradients = state_grads, None if weight_grad is None else weight_grad.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = (None if x is None else x * grads[0].to(x.dtype) for x in ctx.gradients)
        return states, weight, None, None
