"""The timestep embedding ``e_t`` and ``combine``, which adds it to the input of an iteration."""

from __future__ import annotations

from math import log, nan

import torch
from torch import Tensor, nn

from slr_core.config import TimestepConfig

NOISE_WIDTH = 16
"""Width of the MLP that reads the noise level."""
LEAST_CHANGE = 1e-6
"""Relative changes are clamped to this and its inverse: the logarithm of 0 is infinite."""


class Timestep(nn.Module):
    """``combine(x, e_t)``.

    ``sinusoidal`` embeds ``t`` as transformers embed positions and diffusion models embed time (Vaswani
    et al., 2017; Ho et al., 2020), then passes it through an MLP. ``learned`` is one vector per trained
    iteration. Both are defined for trained iterations only: past the last, the caller applies ``past_end``.

    With ``noise_level``, e_t also depends on the last relative change, as diffusion models are conditioned on the
    remaining noise (Karras et al., 2022): its logarithm goes through a small MLP, whose output is added to e_t. A
    learned value replaces the logarithm where there is no relative change yet.
    """

    def __init__(self, config: TimestepConfig, hidden_size: int, trained_iterations: int) -> None:
        super().__init__()
        self.kind, self.combine, self.noise_level = config.kind, config.combine, config.noise_level
        if config.kind == "sinusoidal":
            half = max(1, hidden_size // 2)
            self.mlp = nn.Sequential(
                nn.Linear(2 * half, hidden_size), nn.SiLU(), _small(nn.Linear(hidden_size, hidden_size))
            )
        elif config.kind == "learned":
            self.table = nn.Parameter(0.02 * torch.randn(trained_iterations, hidden_size))
        if config.noise_level:
            self.first_level = nn.Parameter(torch.zeros(()))
            self.level_mlp = nn.Sequential(
                nn.Linear(1, NOISE_WIDTH), nn.SiLU(), _small(nn.Linear(NOISE_WIDTH, hidden_size))
            )
        if self.acts and config.combine == "concat":
            self.merge = nn.Linear(2 * hidden_size, hidden_size)
            with torch.no_grad():
                self.merge.weight.copy_(torch.cat([torch.eye(hidden_size)] * 2, dim=1))
                self.merge.bias.zero_()

    @property
    def acts(self) -> bool:
        """Whether the module changes its input."""
        return self.kind != "none" or self.noise_level

    def embedding(self, t: int) -> Tensor:
        """The part of ``e_t`` ``[d]`` that depends on ``t`` (from 1) alone; undefined for the kind ``none``."""
        if self.kind == "learned":
            return self.table[t - 1]
        first = self.mlp[0].weight
        assert isinstance(first, Tensor)
        half = first.shape[1] // 2
        # In fp32 whatever the model's dtype: rounded angles would make neighbouring iterations equal.
        angles = t * torch.exp(-log(10_000.0) * torch.arange(half, device=first.device) / half)
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()]).to(first.dtype))
        return embedding

    def level(self, change: Tensor) -> Tensor:
        """The part of ``e_t`` ``[..., d]`` that depends on the last relative change ``[...]`` (NaN: none yet)."""
        known = change.detach().clamp(LEAST_CHANGE, 1 / LEAST_CHANGE).log().to(self.first_level.dtype)
        embedding: Tensor = self.level_mlp(torch.where(change.isnan(), self.first_level, known)[..., None])
        return embedding

    def forward(self, x: Tensor, t: int, change: Tensor | None = None) -> Tensor:
        """Combine inputs with ``e_t``; the result has the shape and dtype of ``x``.

        Args:
            x: ``[..., d]``.
            t: a trained iteration, from 1.
            change: the last relative change, of a shape that broadcasts against ``[...]``, NaN where there is
                none yet; only ``noise_level`` uses it. ``None``: none yet in any row.
        """
        if not self.acts:
            return x
        return self.combined(x, None if self.kind == "none" else self.embedding(t), change)

    def combined(self, x: Tensor, e_t: Tensor | None, change: Tensor | None) -> Tensor:
        """As :meth:`forward`, with ``e_t`` given: an :meth:`embedding` that broadcasts, ``None`` for kind ``none``."""
        part = torch.zeros((), dtype=x.dtype, device=x.device) if e_t is None else e_t.to(x.dtype)
        if self.noise_level:
            part = part + self.level(torch.full((), nan, device=x.device) if change is None else change).to(x.dtype)
        if self.combine == "add":
            return x + part
        merged: Tensor = self.merge(torch.cat([x, part.expand_as(x)], dim=-1))
        return merged


def _small(layer: nn.Linear) -> nn.Linear:
    # Embedding tables start near 0.02: e_t must be small beside the input that it is added to.
    nn.init.normal_(layer.weight, std=0.002)
    nn.init.zeros_(layer.bias)
    return layer
