"""Coconut (Hao et al., 2024, arXiv 2412.06769): a chain of continuous thoughts, each the state before it.

Files: one pickle ``checkpoint_N``, a state dict with the prefix ``base_causallm.``, whose embedding table has three
more rows than the base; or a transformers folder with such a table and the three tokens. Neither says how many
thoughts there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slr_core.checkpoint.importers.base import BaseFit, add_markers, drop_buffers, read_config, read_tokenizer
from slr_core.checkpoint.importers.files import Weights, read_weights
from slr_core.checkpoint.importers.peer import FIXED_LOOP, Conversion, LoopStates, Peer, PeerCheckpoint
from slr_core.checkpoint.validate import checkpoint_error
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel

START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
PREFIX = "base_causallm."
TEXT = {"prompt_suffix": f"\n{START}", "answer_prefix": END}
MAX_THOUGHTS = 64


def chain(latents: int) -> dict[str, Any]:
    """Loop settings of a chain of ``latents`` thoughts.

    Raises:
        ConfigError: there are more than :data:`MAX_THOUGHTS`.
    """
    if latents > MAX_THOUGHTS:
        raise ConfigError(f"--latents must be at most {MAX_THOUGHTS}, got {latents}")
    lengths = dict.fromkeys(("trained_iterations", "max_iterations", "min_iterations"), latents)
    return {**FIXED_LOOP, "workspace": "append", **lengths}


def convert_coconut(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of Coconut."""
    source.options.refuse("coconut", "iterations", "lora_alpha", "keep_eos", "keep_adapter")
    weights = read_weights(source.checkpoint)
    loop = chain(
        source.options.require("latents", "the number of thoughts, c_thought x max_latent_stage of its training (6)")
    )
    return with_markers(source, weights, loop)


def with_markers(source: PeerCheckpoint, weights: Weights, loop: dict[str, Any]) -> Conversion:
    """Convert a base model with the three marker tokens of the Coconut family; all of ``weights`` is used or dropped.

    Raises:
        CheckpointError: the weights or the tokenizer are not those of such a model.
    """
    drop_buffers(weights)
    config, tokenizer, where = _base(source, weights)
    if weights.has_prefix(PREFIX):
        state = weights.take_prefix(PREFIX)
        copy = weights.take("embedding.weight") if "embedding.weight" in weights else None
        weights.check_empty()
        fit = BaseFit(where, config, state)
        if copy is not None:
            if not torch.equal(copy, state[fit.table]):
                raise checkpoint_error(weights.where, "embedding.weight is not a copy of the embedding table")
            weights.dropped["embedding.weight (1 tensor)"] = "a copy of the embedding table"
    else:
        state = weights.take_prefix("")
        fit = BaseFit(where, config, state)
    if fit.vocab_size == len(tokenizer) and START not in tokenizer.get_vocab():
        raise checkpoint_error(
            weights.where, f"it has no {START}: a plain model, to which `slr init` adds an untrained loop"
        )
    first = fit.vocab_size - 3
    markers = {START: first, END: first + 1, LATENT: first + 2}
    add_markers(where, tokenizer, markers)
    if len(tokenizer) != fit.vocab_size:
        raise checkpoint_error(
            where, f"its tokenizer has {len(tokenizer)} tokens, the checkpoint {fit.vocab_size} embeddings"
        )
    fit.check()
    return Conversion(
        config, state, tokenizer, markers, loop, dict(TEXT), fit.dtype, fit.table, dropped=weights.dropped
    )


def _base(source: PeerCheckpoint, weights: Weights) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, Path]:
    """Configuration, tokenizer, and the folder that they are from."""
    folder = source.checkpoint
    if weights.has_prefix(PREFIX):
        base = source.require_base()
        return read_config(base), read_tokenizer(base), base
    # A transformers folder; without the three tokens it is a plain model.
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise checkpoint_error(
            folder, f"no tensor begins with {PREFIX}: a plain model, to which `slr init` adds an untrained loop"
        )
    own = read_tokenizer(folder) if any(folder.glob("tokenizer*.json")) else read_tokenizer(source.require_base())
    config = read_config(folder)
    return config, own, folder


def recorded_thoughts(reasoner: LoopedModel, loop: LoopStates) -> dict[str, Tensor]:
    """The vectors that were fed at the latent positions."""
    return {"": loop.states[:-2, 0]}


PEER = Peer(
    name="coconut",
    title="Coconut",
    repository="https://github.com/facebookresearch/coconut",
    licence="MIT",
    convert=convert_coconut,
    recorded=recorded_thoughts,
)
