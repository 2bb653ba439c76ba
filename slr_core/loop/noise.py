"""Noise in the initial state of a loop, to see whether the loop comes back to the state that it reaches without it."""

from __future__ import annotations

import torch
from torch import Tensor

from slr_core.params import ResolvedLoopParams


def perturb(hidden: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """``hidden`` with Gaussian noise, whose standard deviation is ``scale`` times each position's RMS.

    Args:
        hidden: ``[W, d]``.
        scale: at least 0.
        generator: on the CPU, so that every device gets the same noise.
    """
    noise = torch.randn(hidden.shape, generator=generator)
    rms = hidden.float().pow(2).mean(-1, keepdim=True).sqrt()
    return hidden + (scale * rms * noise.to(rms)).to(hidden.dtype)


def perturb_start(initial: Tensor, params: ResolvedLoopParams) -> Tensor:
    """h_0 ``[W, d]`` of one row, with the noise that its parameters request. Without a loop there is none."""
    if params.noise_scale == 0 or params.max_iterations == 0:
        return initial
    return perturb(initial, params.noise_scale, torch.Generator().manual_seed(params.noise_seed))
