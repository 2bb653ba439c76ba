"""Ouro (Zhu et al., 2025): a looped language model. All positions run the whole stack several times, norm included.

Files: a transformers folder of the type ``ouro``, whose code is not part of transformers. A layer has norms before and
after attention and MLP, as the layers of GLM-4 do: that architecture computes one pass.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from slr_core.checkpoint.importers.base import BaseFit, drop_buffers, read_tokenizer
from slr_core.checkpoint.importers.files import read_weights
from slr_core.checkpoint.importers.peer import FIXED_LOOP, Conversion, LoopStates, Peer, PeerCheckpoint
from slr_core.checkpoint.validate import checkpoint_error, read_json
from slr_core.model.looped import LoopedModel

GATE = "model.early_exit_gate"
NORMS = {"input_layernorm_2": "post_self_attn_layernorm", "post_attention_layernorm_2": "post_mlp_layernorm"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MAX_LOOPS = 64


def convert_ouro(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of Ouro.

    Its gate becomes the halting head, its threshold q the threshold 1 - q of the criterion `survival`. The loop then
    stops where the peer's code computes all loops and reads an earlier state.
    """
    folder = source.checkpoint
    source.options.refuse("ouro", "latents", "lora_alpha", "keep_eos", "keep_adapter")
    if not folder.is_dir():
        raise checkpoint_error(folder, "expected a folder")
    stored = read_json(folder / "config.json")
    if not isinstance(stored, dict) or stored.get("model_type") != "ouro":
        raise checkpoint_error(folder / "config.json", "model_type must be ouro")
    loops, threshold = _loop_length(folder, stored)
    source.options.agree("iterations", loops)
    tokenizer = read_tokenizer(folder)
    weights = read_weights(folder)
    drop_buffers(weights)
    probe = {f"halting.probe.{part}": weights.take(f"{GATE}.{part}") for part in ("weight", "bias")}
    config = _glm4(folder, stored)
    state = _as_glm4(folder, weights.take_prefix(""), config.head_dim)
    fit = BaseFit(folder, config, state)
    fit.check()
    loop = {
        **FIXED_LOOP,
        "workspace": "token",
        **dict.fromkeys(("trained_iterations", "max_iterations"), loops),
        "min_iterations": 1,
        "convergence": {"criterion": "survival", "threshold": 1 - threshold},
        "halting_head": True,
    }
    text = {"stop_token_ids": _further_ends(folder, tokenizer.eos_token_id)}
    return Conversion(
        config, state, tokenizer, {}, loop, text, fit.dtype, fit.table, modules=probe, dropped=weights.dropped
    )


def _loop_length(folder: Path, stored: dict[str, Any]) -> tuple[int, float]:
    """The loops that an answer runs at most, and the threshold of their exit probabilities."""
    loops, step, threshold = (
        stored.get(name, default)
        for name, default in (("total_ut_steps", None), ("early_exit_step", None), ("early_exit_threshold", 1.0))
    )
    if not isinstance(loops, int) or not 1 <= loops <= MAX_LOOPS:
        raise checkpoint_error(folder / "config.json", f"total_ut_steps must be a number from 1 to {MAX_LOOPS}")
    if step is not None:
        if not isinstance(step, int) or not 0 <= step < loops:
            raise checkpoint_error(folder / "config.json", f"early_exit_step must be a number from 0 to {loops - 1}")
        return step + 1, 1.0  # the state of this loop is read, whatever the gate says
    if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise checkpoint_error(folder / "config.json", "early_exit_threshold must be a number from 0 to 1")
    return loops, float(threshold)


def _glm4(folder: Path, stored: dict[str, Any]) -> PreTrainedConfig:
    for name in SIZES:
        if not isinstance(stored.get(name), int) or stored[name] < 1:
            raise checkpoint_error(folder / "config.json", f"{name} must be a positive number")
    kinds = set(stored.get("layer_types") or ()) - {"full_attention"}
    if kinds or stored.get("use_sliding_window") or stored.get("rope_scaling"):
        raise checkpoint_error(folder / "config.json", "sliding windows and scaled rotary embeddings are not supported")
    heads = stored["num_attention_heads"]
    copied = ("hidden_act", "initializer_range", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    rope = {
        "rope_type": "default",
        "rope_theta": float(stored.get("rope_theta", 10_000.0)),
        "partial_rotary_factor": 1.0,
    }
    return AutoConfig.for_model(
        "glm4",
        **{name: stored[name] for name in (*SIZES, *copied) if name in stored},
        num_key_value_heads=stored.get("num_key_value_heads") or heads,
        head_dim=stored.get("head_dim") or stored["hidden_size"] // heads,
        attention_bias=False,
        rope_parameters=rope,
        partial_rotary_factor=1.0,
        **{f"{name}_token_id": stored.get(f"{name}_token_id") for name in ("bos", "pad")},
        eos_token_id=stored.get("eos_token_id", -1),
    )


def _as_glm4(folder: Path, tensors: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The weights under GLM-4's names and in its order: gate and up in one, rotary neighbours in pairs."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = re.sub(r"\.(\w+_2)\.weight$", lambda found: f".{NORMS.get(found[1], found[1])}.weight", name)
        if re.search(r"\.self_attn\.[qk]_proj\.weight$", name):
            if len(tensor) % head_dim:
                raise checkpoint_error(folder, f"{name} has {len(tensor)} rows, expected a multiple of {head_dim}")
            # Rows of a head: from halves to pairs.
            width = tensor.shape[1]
            tensor = tensor.view(-1, 2, head_dim // 2, width).transpose(1, 2).reshape(-1, width)
        elif renamed.endswith(".mlp.gate_proj.weight"):
            up = tensors.get(name.replace("gate_proj", "up_proj"))
            if up is None:
                raise checkpoint_error(folder, f"{name} has no up_proj beside it")
            renamed, tensor = renamed.replace("gate_proj", "gate_up_proj"), torch.cat([tensor, up])
        elif renamed.endswith(".mlp.up_proj.weight") and name.replace("up_proj", "gate_proj") in tensors:
            continue
        state[renamed] = tensor
    return state


def _further_ends(folder: Path, end: int | None) -> list[int]:
    """Ends of an answer that the generation config lists besides the tokenizer's end token."""
    path = folder / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = listed if isinstance(listed, list) else [listed]
    return [token for token in ids if isinstance(token, int) and token != end]


def recorded_states(reasoner: LoopedModel, loop: LoopStates) -> dict[str, Tensor]:
    """The state after each loop at the prompt's last token."""
    return {".states": loop.states[1:-1, -1]}


PEER = Peer(
    name="ouro",
    title="Ouro",
    repository="https://github.com/LoopedLMs/ouro_rl",
    licence="MIT; its modelling files: Apache-2.0",
    convert=convert_ouro,
    recorded=recorded_states,
)
