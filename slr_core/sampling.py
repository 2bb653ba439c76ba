"""Choosing the next token: greedy, or temperature with top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from slr_core.errors import RequestError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep the whole vocabulary.

    Raises:
        RequestError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, accepted in (
            ("temperature", 0 <= self.temperature < inf, "a number from 0"),
            ("top_k", self.top_k >= 0, "a whole number from 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "a whole number from 0 to 2**64 - 1"),
        ):
            if not fine:
                raise RequestError(f"{name} must be {accepted}, got {getattr(self, name)}", param=name)

    def generator(self) -> torch.Generator | None:
        """The request's own source of randomness: its draws do not depend on its batch."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits: Tensor, settings: SamplingSettings, generator: torch.Generator | None) -> int:
    """The next token's id from logits ``[V]``."""
    if generator is None:
        return int(logits.argmax())
    scaled = logits.float().cpu()
    scaled = (scaled - scaled.max()) / settings.temperature  # at most 0: a small temperature cannot overflow
    if settings.top_k:
        kept = scaled.topk(min(settings.top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < kept, -torch.inf)
    if settings.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(descending=True)
        # Keep the smallest set that reaches top_p: drop what lies past it, never the first.
        beyond = ordered.cumsum(-1) - ordered >= settings.top_p
        beyond[0] = False
        scaled[order[beyond]] = -torch.inf
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
