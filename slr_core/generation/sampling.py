"""Choosing the next token: greedy, or temperature with top-k and top-p."""

from __future__ import annotations

import sys
from math import isfinite, nextafter

import torch
from torch import Tensor

from slr_core.errors import EngineError
from slr_core.params import SamplingParams

_SIZES = (256, 8192)
"""How many of the likeliest tokens ``top_p`` tries before it sorts the vocabulary: of 49,152, that takes 20 times as
long as the first and 4 times as long as the second."""


def choose(logits: Tensor, settings: SamplingParams, generator: torch.Generator | None) -> int:
    """The next token's id from logits ``[V]``.

    ``top_k`` keeps exactly that many tokens and ``top_p`` the smallest set of the likeliest that reaches it: of equal
    logits at the edge, some. A draw takes one number from ``generator``, whatever the settings.

    Raises:
        EngineError: nothing can be drawn, as the best logit is infinite or one is not a number.
    """
    if generator is None:
        return int(logits.argmax())
    scores, ids = logits.float().cpu(), None
    if 0 < settings.top_k < len(scores):
        scores, ids = scores.topk(settings.top_k)
    weights = _weights(scores, settings.temperature)
    if settings.top_p < 1:
        weights, kept = _likeliest(weights, settings.top_p)
        ids = kept if ids is None else ids[kept]
    drawn = _draw(weights, generator)
    return drawn if ids is None else int(ids[drawn])


def _weights(scores: Tensor, temperature: float) -> Tensor:
    """What each of the scores ``[N]`` weighs, in float64: 1 for the best."""
    weights = scores.double()
    # At most 0: a small temperature cannot overflow. A factor is a third of a division's cost, and must be finite.
    return weights.sub_(weights.amax()).mul_(1 / max(temperature, sys.float_info.min)).exp_()


def _likeliest(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of the weights ``[N]`` that reach ``top_p`` of their sum, and their indices; never none."""
    enough = top_p * weights.sum().item()
    for size in (*_SIZES, len(weights)):
        ordered, order = weights.topk(min(size, len(weights)))
        sums = ordered.cumsum(-1)
        if sums[-1] >= enough:
            break
    count = 1 + int(torch.searchsorted(sums, enough))
    return ordered[:count], order[:count]


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """An index into weights ``[N]``, each as likely as it weighs."""
    # By the inverse of the running sum: torch.multinomial takes a random number for every weight.
    sums = weights.cumsum(-1)
    total = sums[-1].item()
    if not isfinite(total):
        raise EngineError("the model's logits are not numbers")
    at = total * torch.rand((), dtype=torch.float64, generator=generator).item()
    # The first sum above ``at`` never belongs to a weight of 0, and there is one as long as ``at`` is below the total.
    return int(torch.searchsorted(sums, min(at, nextafter(total, 0)), right=True))
