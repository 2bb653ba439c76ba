"""CODI (Shen et al., 2025, arXiv 2502.21074): a chain of thoughts, each the projected state before it.

Files: ``pytorch_model.bin``, or safetensors shards: a base model with a LoRA adapter that acts in every pass, and the
projection ``prj``. No file says how many thoughts there are, alpha, or which base it is; two of the three marker tokens
are only numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slr_core.checkpoint.importers.base import (
    BaseFit,
    add_markers,
    drop_buffers,
    read_config,
    read_tokenizer,
    widest_dtype,
)
from slr_core.checkpoint.importers.coconut import chain
from slr_core.checkpoint.importers.files import Weights, read_weights
from slr_core.checkpoint.importers.lora import adapter_settings, merge_lora, split_lora
from slr_core.checkpoint.importers.peer import Conversion, LoopStates, Peer, PeerCheckpoint
from slr_core.checkpoint.validate import checkpoint_error
from slr_core.model.looped import LoopedModel

# The peer's code has numbers for the last two: these texts are not likely in a prompt.
PAD, START, END = "[PAD]", "<|bot|>", "<|eot|>"
WRAPPED, PLAIN = "codi.base_model.model.", "codi."
LAYERS = {"prj.1": "project.layers.0", "prj.3": "project.layers.2", "prj.ln": "project.layers.3"}


def convert_codi(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of CODI."""
    return convert_weights(source, read_weights(source.checkpoint), "codi")


def convert_weights(source: PeerCheckpoint, weights: Weights, peer: str) -> Conversion:
    """Convert the tensors of a CODI checkpoint; all of ``weights`` is used or dropped.

    Raises:
        CheckpointError: they are not those of such a model.
        ConfigError: an option is missing or has no meaning here.
    """
    options = source.options
    options.refuse(peer, "iterations")
    loop = chain(options.require("latents", "the number of thoughts, --inf_latent_iterations of its test script (6)"))
    base = source.require_base()
    config, tokenizer = read_config(base), read_tokenizer(base)
    drop_buffers(weights)
    if not weights.has_prefix(PLAIN):
        raise checkpoint_error(weights.where, f"no tensor begins with {PLAIN}: not a checkpoint of CODI")
    prefix = WRAPPED if weights.has_prefix(WRAPPED) else PLAIN
    state, lora = split_lora(weights.take_prefix(prefix), ".default.weight")
    modules, projection = take_projection(weights, LAYERS)
    hint = "; `simcot-codi` drops SIM-CoT's auxiliary decoder" if weights.has_prefix("decoder.") else ""
    weights.check_empty(hint)

    fit = BaseFit(base, config, state)
    if fit.vocab_size != fit.base_vocab_size + 3:
        raise checkpoint_error(
            base,
            f"the checkpoint has {fit.vocab_size} embeddings, this base {fit.base_vocab_size} and three markers",
        )
    dtype = source.dtype or widest_dtype([*state.values(), *lora.values(), *modules.values()])
    if lora:
        alpha = options.require("lora_alpha", "alpha of its LoRA adapter, --lora_alpha of its scripts (often 32)")
        if options.keep_adapter:
            loop["lora"] = adapter_settings(weights.where, state, lora, alpha)
        else:
            merge_lora(weights.where, state, lora, alpha=alpha, transposed=fit.transposed, dtype=dtype)
    else:
        options.refuse(peer, "lora_alpha", "keep_adapter")
    fit.check()
    first = fit.base_vocab_size
    markers = {PAD: first, START: first + 1, END: first + 2}
    add_markers(base, tokenizer, markers, fill=True, special=True)
    eos = str(tokenizer.eos_token) if options.keep_eos else ""
    text = {
        "prompt_strip": True,
        "prompt_replace": [["  ", " "]],
        "prompt_suffix": f"{eos}{START}",
        "answer_prefix": f"{END}{eos}",
        "suppressed_token_ids": [markers[END]],
    }
    kept = lora if options.keep_adapter else {}
    return Conversion(
        config,
        state,
        tokenizer,
        markers,
        {**loop, "projection": projection},
        text,
        dtype,
        fit.table,
        modules,
        weights.dropped,
        kept,
    )


def take_projection(weights: Weights, layers: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a projection under this project's names, and its settings; the identity where there is none.

    Args:
        weights: the checkpoint's; those of the projection are removed.
        layers: names of the first, the second and the norm layer, and those that they have here.

    Raises:
        CheckpointError: a tensor is missing.
    """
    first, second, norm = layers
    if not weights.has_prefix(f"{first}."):
        return {}, {"kind": "identity"}
    has_norm = weights.has_prefix(f"{norm}.")
    modules = {
        f"{layers[name]}.{part}": weights.take(f"{name}.{part}")
        for name in (first, second, *([norm] if has_norm else []))
        for part in ("weight", "bias")
    }
    inner = modules[f"{layers[first]}.weight"].shape[0]
    return modules, {"kind": "mlp", "inner_size": inner, "norm": has_norm}


def recorded_projections(reasoner: LoopedModel, loop: LoopStates) -> dict[str, Tensor]:
    """The state before each thought and after the last, and the projections that were fed."""
    chain_states = loop.states[:-1, 0]
    with torch.inference_mode():
        return {".states": chain_states, ".fed": reasoner.project_in(chain_states[:-1])}


PEER = Peer(
    name="codi",
    title="CODI",
    repository="https://github.com/zhenyi4/codi",
    licence="none in its repository",
    convert=convert_codi,
    recorded=recorded_projections,
)
