"""Log-probabilities of tokens: those that a prompt has, those that were written, and the likeliest in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from slr_core.types import TokenScore, finite_or_none

_AT_ONCE = 64
"""Positions whose logits are in memory together: a vocabulary is large."""


def score(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenScore]:
    """How likely tokens are.

    Args:
        logits: ``[n, V]``, read before each token; up to a constant each.
        ids: the ``n`` tokens.
        top: how many of the likeliest to tell besides.
    """
    if not ids:
        return []
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs[range(len(ids)), list(ids)].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    return [
        TokenScore(token, finite_or_none(logprob), tuple(zip(tokens, values, strict=True)))
        for token, logprob, tokens, values in zip(ids, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def score_states(head: Callable[[Tensor], Tensor], states: Tensor, ids: Sequence[int], top: int) -> list[TokenScore]:
    """As :func:`score`, from the states ``[n, d]`` that ``head`` reads; those beyond the last token do not count."""
    scored: list[TokenScore] = []
    for at in range(0, len(ids), _AT_ONCE):
        part = ids[at : at + _AT_ONCE]
        scored += score(head(states[at : at + len(part)]), part, top)
    return scored
