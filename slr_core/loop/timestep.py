"""The timestep embedding ``e_t`` and ``combine``: how an iteration knows its number."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from slr_core.config import TimestepConfig


class Timestep(nn.Module):
    """``combine(x, e_t)``.

    ``sinusoidal`` embeds ``t`` as transformers embed positions and diffusion models embed time (Vaswani
    et al., 2017; Ho et al., 2020), then passes it through an MLP. ``learned`` is one vector per trained
    iteration. Either is asked for trained iterations alone: past the last, the caller applies the policy.
    """

    def __init__(self, config: TimestepConfig, hidden_size: int, trained_iterations: int) -> None:
        super().__init__()
        self.kind, self.combine = config.kind, config.combine
        if config.kind == "sinusoidal":
            half = max(1, hidden_size // 2)
            self.mlp = nn.Sequential(
                nn.Linear(2 * half, hidden_size), nn.SiLU(), _small(nn.Linear(hidden_size, hidden_size))
            )
        elif config.kind == "learned":
            self.table = nn.Parameter(0.02 * torch.randn(trained_iterations, hidden_size))
        if config.kind != "none" and config.combine == "concat":
            self.merge = nn.Linear(2 * hidden_size, hidden_size)
            with torch.no_grad():
                self.merge.weight.copy_(torch.cat([torch.eye(hidden_size)] * 2, dim=1))
                self.merge.bias.zero_()

    def embedding(self, t: int) -> Tensor:
        """``e_t`` ``[d]`` for a 1-based iteration ``t`` ."""
        if self.kind == "learned":
            return self.table[t - 1]
        first = self.mlp[0].weight
        assert isinstance(first, Tensor)
        half = first.shape[1] // 2
        # In fp32 whatever the model's dtype: coarse angles would blur neighbouring iterations.
        angles = t * torch.exp(-log(10_000.0) * torch.arange(half, device=first.device) / half)
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()]).to(first.dtype))
        return embedding

    def forward(self, x: Tensor, t: int) -> Tensor:
        """Combine inputs ``[..., d]`` with ``e_t``; the result has the shape and dtype of ``x``."""
        if self.kind == "none":
            return x
        e_t = self.embedding(t).to(x.dtype)
        if self.combine == "add":
            return x + e_t
        merged: Tensor = self.merge(torch.cat([x, e_t.expand_as(x)], dim=-1))
        return merged


def _small(layer: nn.Linear) -> nn.Linear:
    # Embedding tables start near 0.02: e_t must not drown what it is added to.
    nn.init.normal_(layer.weight, std=0.002)
    nn.init.zeros_(layer.bias)
    return layer
