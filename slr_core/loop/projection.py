"""``project``: from a state (after the final norm) to the next iteration's input embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slr_core.config import ProjectionConfig


class Projection(nn.Module):
    """Maps states ``[..., d]`` to inputs ``[..., d]`` of the same dtype.

    The output of the final norm is much larger than a token embedding (embedding tables are initialised near 0.02),
    so feeding it back unscaled gives the model inputs outside its training range. ``rms_match`` rescales each state
    to the RMS of the embedding table. ``pause`` is the control of Goyal et al. (2023, arXiv 2310.02226) and Hao et
    al. (2024): a learned vector in place of the state, so no feedback. ``expected_embedding`` needs the base model's
    head and embeddings: see :meth:`slr_core.model.adapted.AdaptedModel.expected_embedding`.
    """

    def __init__(self, config: ProjectionConfig, hidden_size: int) -> None:
        super().__init__()
        self.kind = config.kind
        self.layers: nn.Module = nn.Identity()
        if config.kind == "pause":
            self.vector = nn.Parameter(0.02 * torch.randn(hidden_size))
        elif config.kind == "linear":
            self.layers = _near_identity(hidden_size)
        elif config.kind == "mlp":
            inner = config.inner_size or hidden_size
            layers = [nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size)]
            self.layers = nn.Sequential(*layers, *([nn.LayerNorm(hidden_size)] if config.norm else []))

    def forward(self, hidden: Tensor, embedding_rms: Tensor) -> Tensor:
        """Project ``hidden`` ``[..., d]``; ``embedding_rms`` is a scalar that only ``rms_match`` uses."""
        if self.kind == "pause":
            return self.vector.to(hidden.dtype).expand_as(hidden)
        if self.kind == "rms_match":
            return rms_normalize(hidden) * embedding_rms.to(hidden.dtype)
        projected: Tensor = self.layers(hidden)
        return projected


def rms_normalize(x: Tensor) -> Tensor:
    """Scale ``x`` ``[..., d]`` to a root mean square of 1 over its last dimension."""
    wide = x if x.dtype == torch.float64 else x.float()  # squares of large values overflow fp16
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _near_identity(size: int) -> nn.Linear:
    # Near the identity, so that an untrained loop is close to plain feedback.
    layer = nn.Linear(size, size)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(size) + 1e-3 * torch.randn(size, size))
        layer.bias.zero_()
    return layer
