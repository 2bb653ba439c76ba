"""Choosing the next token: greedy, or by temperature with top-k and top-p."""

from __future__ import annotations

import sys
from math import isfinite, nextafter

import torch
from torch import Tensor

from slr_core.errors import EngineError
from slr_core.params import SamplingParams

_SIZES = (256, 8192)
"""How many of the most likely tokens ``top_p`` tries before it sorts the whole vocabulary: sorting 49,152 tokens takes
20 times as long as the first size and 4 times as long as the second."""


def sample_token(logits: Tensor, settings: SamplingParams, generator: torch.Generator | None) -> int:
    """The next token's id from logits ``[V]``; without a generator, the most likely one.

    ``top_k`` keeps exactly that many tokens, ``top_p`` the smallest set of the most likely tokens that reaches it.
    Which of several equal logits at the edge are kept is not defined. Every draw takes one number from ``generator``,
    whatever the settings.

    Raises:
        EngineError: the largest logit is infinite or a logit is NaN, so that nothing can be drawn.
    """
    if generator is None:
        return int(logits.argmax())
    scores, ids = logits.float().cpu(), None
    if 0 < settings.top_k < len(scores):
        scores, ids = scores.topk(settings.top_k)
    weights = _weights(scores, settings.temperature)
    if settings.top_p < 1:
        weights, kept = _top_p(weights, settings.top_p)
        ids = kept if ids is None else ids[kept]
    drawn = _draw(weights, generator)
    return drawn if ids is None else int(ids[drawn])


def _weights(scores: Tensor, temperature: float) -> Tensor:
    """Unnormalised probabilities ``[N]`` float64 of scores ``[N]``: 1 for the largest."""
    weights = scores.double()
    # The largest exponent is 0: a small temperature cannot overflow. Multiplying takes a third of the time of dividing,
    # and the factor must be finite.
    return weights.sub_(weights.amax()).mul_(1 / max(temperature, sys.float_info.min)).exp_()


def _top_p(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of the weights ``[N]`` that reach ``top_p`` of their sum, at least one, and their indices."""
    enough = top_p * weights.sum().item()
    for size in (*_SIZES, len(weights)):
        ordered, order = weights.topk(min(size, len(weights)))
        sums = ordered.cumsum(-1)
        if sums[-1] >= enough:
            break
    count = 1 + int(torch.searchsorted(sums, enough))
    return ordered[:count], order[:count]


def _draw(weights: Tensor, generator: torch.Generator) -> int:
    """A random index into weights ``[N]``, with probabilities proportional to them."""
    # By inverting the running sum: torch.multinomial would take a random number for every weight.
    sums = weights.cumsum(-1)
    total = sums[-1].item()
    if not isfinite(total):
        raise EngineError("the model's logits are not finite")
    at = total * torch.rand((), dtype=torch.float64, generator=generator).item()
    # The first sum above ``at`` belongs to a positive weight, and one exists as long as ``at`` is below the total.
    return int(torch.searchsorted(sums, min(at, nextafter(total, 0)), right=True))
