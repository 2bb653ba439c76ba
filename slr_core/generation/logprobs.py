"""Log-probabilities of given tokens and of the most likely ones in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

from torch import Tensor

from slr_core.types import TokenScore, finite_or_none

_CHUNK = 64
"""Positions whose logits ``[V]`` are in memory at the same time."""


def score(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenScore]:
    """Log-probabilities of tokens.

    Args:
        logits: ``[n, V]``, read before each token.
        ids: the ``n`` tokens.
        top: how many of the most likely tokens to add to each; fewer if the others are suppressed.
    """
    if not ids:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[range(len(ids)), list(ids)].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    return [
        TokenScore(token, finite_or_none(logprob), tuple(x for x in zip(tokens, values, strict=True) if isfinite(x[1])))
        for token, logprob, tokens, values in zip(ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def score_states(head: Callable[[Tensor], Tensor], states: Tensor, ids: Sequence[int], top: int) -> list[TokenScore]:
    """As :func:`score`, from states.

    Args:
        head: logits ``[..., V]`` from states ``[..., d]``.
        states: ``[m, d]`` with ``m >= n``, read before each token; those after the last token are ignored.
        ids: the ``n`` tokens.
        top: how many of the most likely tokens to add to each.
    """
    scored: list[TokenScore] = []
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        scored += score(head(states[start : start + len(part)]), part, top)
    return scored
