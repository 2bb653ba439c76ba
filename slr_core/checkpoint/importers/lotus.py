"""LOTUS (arXiv 2606.31779): a block of latent positions, refined in place and in parallel.

Files: a transformers folder, or a pickle ``checkpoint_final`` with Coconut's keys. Neither says how many latent
positions or loops there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slr_core.checkpoint.importers.coconut import LATENT, with_markers
from slr_core.checkpoint.importers.files import read_weights
from slr_core.checkpoint.importers.peer import FIXED_LOOP, Conversion, LoopStates, Peer, PeerCheckpoint
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel


def block(latents: int, loops: int) -> dict[str, Any]:
    """Loop settings of ``loops`` passes over ``latents`` positions."""
    return {
        **FIXED_LOOP,
        "workspace": "block",
        "block_size": latents,
        **dict.fromkeys(("trained_iterations", "max_iterations", "min_iterations"), loops),
        "residual": {"source": "initial", "mix": "add", "scale": 1.0},
    }


def convert_lotus(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of LOTUS.

    The latent token's embedding is the first input of every position, and is added to the state in every later one.
    The peer's last pass is the closing pass here.
    """
    source.options.refuse("lotus", "lora_alpha", "keep_eos", "keep_adapter")
    latents = source.options.require("latents", "all latent positions, loops x latents per loop (6 x 13 for GPT-2)")
    loops = source.options.require("iterations", "the number of loops over the latent positions (6)")
    if latents % loops:
        raise ConfigError(f"--latents must be a multiple of --iterations ({loops}), got {latents}")
    weights = read_weights(source.checkpoint)
    weights.drop(r"ia_decoder\..*", "ia_decoder.*", "its auxiliary decoder, which is for training alone")
    conversion = with_markers(source, weights, block(latents, loops))
    vectors = conversion.table[conversion.markers[LATENT]].expand(latents, -1)
    conversion.modules["workspace.vectors"] = vectors
    return conversion


def recorded_passes(reasoner: LoopedModel, loop: LoopStates) -> dict[str, Tensor]:
    """The outputs of the passes over the latent positions."""
    with torch.inference_mode():
        return {"": loop.states[1:] - loop.states[0]}


PEER = Peer(
    name="lotus",
    title="LOTUS",
    repository="https://github.com/yingfan-bot/lotus",
    licence="MIT",
    convert=convert_lotus,
    recorded=recorded_passes,
)
