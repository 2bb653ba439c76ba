"""``residual``: the next state from the iteration's output and an earlier state."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from slr_core.config import ResidualConfig
from slr_core.loop.projection import rms_normalize


class Residual(nn.Module):
    """``h_t = residual(g_t, h_{t-1}, h_0)``, states ``[..., d]``.

    With alpha in (0, 1], per channel and learned for ``gated``:
    ``add``: ``g + scale * s``; ``convex`` and ``gated``: ``alpha * g + (1 - alpha) * s``, where ``s`` is
    ``h_0`` or ``h_{t-1}``. ``norm`` then rescales the sum (RMS) with a learned weight per channel.
    """

    def __init__(self, config: ResidualConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        if config.source != "none" and config.mix == "gated":
            start = log(config.alpha / (1 - config.alpha))
            self.gate = nn.Parameter(torch.full((hidden_size,), start))
        if config.norm:
            self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, g: Tensor, previous: Tensor, initial: Tensor) -> Tensor:
        """``h_t`` from g_t, h_{t-1} and h_0, all of the same shape ``[..., d]`` and dtype."""
        mixed = g if self.config.source == "none" else self._mix(g, previous, initial)
        return rms_normalize(mixed) * self.weight.to(mixed.dtype) if self.config.norm else mixed

    def _mix(self, g: Tensor, previous: Tensor, initial: Tensor) -> Tensor:
        s = previous if self.config.source == "previous" else initial
        if self.config.mix == "add":
            return g + self.config.scale * s
        alpha = torch.sigmoid(self.gate).to(g.dtype) if self.config.mix == "gated" else self.config.alpha
        return alpha * g + (1 - alpha) * s
