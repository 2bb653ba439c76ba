"""The latent decoder: from latent states to text, by cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slr_core.config import LatentDecoderConfig
from slr_core.loop.projection import rms_normalize


class LatentDecoder(nn.Module):
    """A small transformer decoder whose cross-attention reads the states of a loop.

    SIM-CoT's auxiliary decoder (Wei et al., 2025) decodes one latent state into one reasoning step in the same way.

    Tokens are embedded by the base model and logits are computed by its LM head: this module maps latent states and
    token embeddings ``[..., d]`` of the base to states ``[..., d]`` that the head reads.
    """

    def __init__(self, config: LatentDecoderConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.read = nn.Linear(hidden_size, width)
        self.embed = nn.Linear(hidden_size, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, hidden_size)

    def forward(self, memory: Tensor, present: Tensor, embeds: Tensor) -> Tensor:
        """States from which each next token is read, ``[B, n + 1, d]``: at the start, and after each token.

        Args:
            memory: latent states ``[B, S, d]`` in order.
            present: ``[B, S]`` bool, the real ones, at least one per row.
            embeds: embeddings ``[B, n, d]`` of the tokens so far.
        """
        dtype = self.start.dtype
        # Normalized: the scale of the states depends on the base model and carries no meaning.
        latent = self.read(rms_normalize(memory).to(dtype))
        latent = latent + _positions(memory.shape[1], latent)
        tokens = torch.cat([self.start.expand(len(memory), 1, -1), self.embed(rms_normalize(embeds).to(dtype))], dim=1)
        tokens = tokens + _positions(tokens.shape[1], tokens)
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            tokens = layer(tokens, latent, tgt_mask=causal, memory_key_padding_mask=~present)
        written: Tensor = self.write(self.norm(tokens))
        return written.to(memory.dtype)


def _positions(count: int, like: Tensor) -> Tensor:
    # Sinusoidal, so that the length is not bounded.
    half = like.shape[-1] // 2
    rates = torch.exp(-9.0 * torch.arange(half, device=like.device) / half)
    angles = torch.arange(count, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
