"""PCCoT (Wu et al., 2025): latent positions that each read their left neighbour, all of them in every iteration.

Files: ``config.json`` of the type ``pccot-gpt2`` or ``pccot-llama``, ``pccot_args.json``, the tokenizer with its four
tokens, and either a PEFT adapter or the whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slr_core.checkpoint.importers.base import (
    BaseFit,
    drop_buffers,
    read_config,
    read_tokenizer,
    widest_dtype,
)
from slr_core.checkpoint.importers.codi import take_projection
from slr_core.checkpoint.importers.files import SINGLE, Weights, read_weights
from slr_core.checkpoint.importers.lora import merge_lora, split_lora
from slr_core.checkpoint.importers.peer import FIXED_LOOP, Conversion, LoopStates, Peer, PeerCheckpoint
from slr_core.checkpoint.validate import checkpoint_error, read_json
from slr_core.model.looped import LoopedModel

ARGS, ADAPTER, ADAPTER_CONFIG = "pccot_args.json", "adapter_model.safetensors", "adapter_config.json"
TYPES = {"pccot-gpt2": "gpt2", "pccot-llama": "llama"}
WRAPPED = "base_model.model."
LAYERS = {"prj.0": "project.layers.0", "prj.2": "project.layers.2", "prj.3": "project.layers.3"}
UNSUPPORTED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "layer_replication", "lora_bias")
"""Settings of an adapter that change what it computes, and that the peer leaves off."""
OWN_FIELDS = ("num_iterations", "use_projection", "use_layerwise_std", "loss_alpha", "loss_beta", "loss_gamma")
"""Fields of the peer's configuration that are not the base model's."""


def convert_pccot(source: PeerCheckpoint) -> Conversion:
    """Convert a checkpoint of PCCoT.

    The first pass reads the latent token's embedding at every position, and is iteration 1. Each later pass feeds every
    position the state of the one before it; the peer's last pass is the closing pass here.
    """
    options, folder = source.options, source.checkpoint
    options.refuse("pccot", "lora_alpha", "keep_eos", "keep_adapter")
    if not folder.is_dir():
        raise checkpoint_error(folder, "expected a folder, which the training script leaves")
    args, stored = _fields(folder / ARGS), _fields(folder / "config.json")
    latents, iterations = _count(folder / ARGS, args, "num_latent_tokens"), _count(folder, stored, "num_iterations")
    options.agree("latents", latents)
    options.agree("iterations", iterations)
    kind = TYPES.get(str(stored.get("model_type")))
    if kind is None:
        raise checkpoint_error(folder / "config.json", f"model_type must be one of {', '.join(TYPES)}")
    config = _own_fields_removed(read_config(folder, kind))
    tokenizer = read_tokenizer(folder)
    markers = _markers(folder, args, tokenizer.get_vocab())

    has_adapter = (folder / ADAPTER).is_file()
    weights = read_weights(folder, (ADAPTER,) if has_adapter else SINGLE)
    drop_buffers(weights)
    fit, modules, projection, dtype = (_adapter if has_adapter else _whole)(source, weights, config)
    weights.check_empty()
    fit.check()
    if len(tokenizer) > fit.vocab_size:
        raise checkpoint_error(folder, f"its tokenizer has {len(tokenizer)} tokens, its table {fit.vocab_size} rows")
    loop = {
        **FIXED_LOOP,
        "workspace": "block",
        "block_size": latents,
        "feedback": "shifted",
        "projection": projection,
        **dict.fromkeys(("trained_iterations", "max_iterations", "min_iterations"), iterations),
    }
    start, end, latent = list(markers)[:3]
    text = {"prompt_suffix": start, "answer_prefix": end + str(args.get("answer_prompt", ""))}
    conversion = Conversion(
        config, fit.weights, tokenizer, markers, loop, text, dtype, fit.table, modules, weights.dropped
    )
    modules["workspace.vectors"] = conversion.table[markers[latent]].expand(latents, -1)
    return conversion


def _fields(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise checkpoint_error(path, "expected a JSON object")
    return data


def _count(path: Path, data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1024:
        raise checkpoint_error(path, f"{name} must be a number from 1 to 1024, got {value}")
    return value


def _own_fields_removed(config: PreTrainedConfig) -> PreTrainedConfig:
    for name in OWN_FIELDS:
        if hasattr(config, name):
            delattr(config, name)
    return config


def _markers(folder: Path, args: dict[str, Any], vocab: dict[str, int]) -> dict[str, int]:
    """The marker tokens in the tokenizer at the ids of ``pccot_args.json``: opening, closing, latent."""
    by_id, markers = {i: token for token, i in vocab.items()}, {}
    for name in ("bot", "eot", "latent"):
        found = args.get(f"{name}_token_id")
        if not isinstance(found, int) or found not in by_id:
            raise checkpoint_error(folder, f"its tokenizer has no token of the id {found}, {name}_token_id in {ARGS}")
        if by_id[found] != f"<pcot.{name}>":
            raise checkpoint_error(
                folder, f"its tokenizer has {by_id[found]} at the id {found}, where {ARGS} expects <pcot.{name}>"
            )
        markers[by_id[found]] = found
    return markers


_Parts = tuple[BaseFit, dict[str, Tensor], dict[str, Any], torch.dtype]


def _whole(source: PeerCheckpoint, weights: Weights, config: PreTrainedConfig) -> _Parts:
    """The model as a whole, with the projection among its tensors."""
    modules, projection = take_projection(weights, LAYERS)
    fit = BaseFit(source.checkpoint, config, weights.take_prefix(""))
    return fit, modules, projection, source.dtype or widest_dtype([*fit.weights.values(), *modules.values()])


def _adapter(source: PeerCheckpoint, weights: Weights, config: PreTrainedConfig) -> _Parts:
    """The base's weights, with the table and the head of the adapter, and its LoRA merged."""
    folder, settings = source.checkpoint, _fields(source.checkpoint / ADAPTER_CONFIG)
    for name in UNSUPPORTED:
        if settings.get(name):
            raise checkpoint_error(folder / ADAPTER_CONFIG, f"{name} is not supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise checkpoint_error(folder / ADAPTER_CONFIG, "r and lora_alpha must be numbers")
    if settings.get("use_rslora"):
        alpha *= rank**0.5
    base = source.require_base("the checkpoint is an adapter, its weights change those of a base")
    state = _base_weights(base, config)
    tensors = weights.take_prefix(WRAPPED)
    # The peer's own loader drops a projection beside an adapter; what was trained is with it.
    prefixed = Weights(folder, {name: x for name, x in tensors.items() if name.startswith("prj.")})
    modules, projection = take_projection(prefixed, LAYERS)
    prefixed.check_empty()
    rows = _token_rows({name: x for name, x in tensors.items() if ".token_adapter." in name}, settings, folder)
    others = {name: x for name, x in tensors.items() if not name.startswith("prj.") and ".token_adapter." not in name}
    heads, lora = split_lora(others, ".weight")
    if unknown := heads.keys() - {"lm_head.weight"}:
        raise checkpoint_error(folder, f"{len(unknown)} tensors have no place in this form, such as {min(unknown)}")
    old = dict(state)
    state |= rows | heads
    fit = BaseFit(folder, config, state)
    _check_base_rows(base, old.get(fit.table), state[fit.table])
    dtype = source.dtype or widest_dtype([*state.values(), *lora.values(), *modules.values()])
    merge_lora(folder, state, lora, alpha=float(alpha), transposed=fit.transposed, dtype=dtype)
    return fit, modules, projection, dtype


def _base_weights(base: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    weights = read_weights(base)
    drop_buffers(weights)
    prefix = {"gpt2": "transformer.", "llama": "model."}[config.model_type]
    # The published GPT-2 has its tensors without a prefix.
    added = "" if weights.has_prefix(prefix) else prefix
    return {name if name.startswith("lm_head.") else added + name: x for name, x in weights.take_prefix("").items()}


def _token_rows(tensors: dict[str, Tensor], settings: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Tables with the trained rows set, by the names of the base model."""
    indices = settings.get("trainable_token_indices")
    tables: dict[str, Tensor] = {}
    layers = sorted({name.partition(".token_adapter.")[0] for name in tensors})
    for layer in layers:
        table = tensors.pop(f"{layer}.token_adapter.base_layer.weight", None)
        rows = tensors.pop(f"{layer}.token_adapter.trainable_tokens_delta", None)
        if table is None or rows is None:
            raise checkpoint_error(folder, f"the trained rows of {layer} are incomplete")
        listed = indices
        if isinstance(indices, dict):  # tied: the head has the table's rows
            listed = next(
                (x for name, x in indices.items() if layer.endswith(name)), next(iter(indices.values()), None)
            )
        if (
            not isinstance(listed, list)
            or len(listed) != len(rows)
            or not all(isinstance(i, int) and 0 <= i < len(table) for i in listed)
        ):
            raise checkpoint_error(folder / ADAPTER_CONFIG, f"trainable_token_indices do not fit the rows of {layer}")
        # Rows, not differences, in the order of the list.
        tables[f"{layer}.weight"] = table.index_copy(0, torch.tensor(listed), rows.to(table.dtype))
    if tensors:
        raise checkpoint_error(folder, f"{len(tensors)} tensors have no place in this form, such as {min(tensors)}")
    return tables


def _check_base_rows(base: Path, old: Tensor | None, new: Tensor) -> None:
    """The adapter's table begins with the base's; only the trained rows differ."""
    if old is None:
        return
    count = min(len(old), len(new))
    same_width = old.shape[1:] == new.shape[1:]
    if (
        not same_width
        or torch.isclose(old[:count].float(), new[:count].float(), 1e-2, 1e-3).all(-1).float().mean() < 0.5
    ):
        raise checkpoint_error(base, "the checkpoint does not fit this base: most rows of the embedding table differ")


def recorded_blocks(reasoner: LoopedModel, loop: LoopStates) -> dict[str, Tensor]:
    """Inputs and states of the passes over the latent positions, without the first, which runs the question, too."""
    before = loop.states[1:-1]
    with torch.inference_mode():
        fed = reasoner.feed_back(before, loop.prompt_state.expand(len(before), -1))
    return {".fed": fed, ".states": loop.states[2:]}


PEER = Peer(
    name="pccot",
    title="PCCoT",
    repository="https://github.com/whyNLP/PCCoT",
    licence="none in its repository",
    convert=convert_pccot,
    recorded=recorded_blocks,
    reads_base_weights=True,
)
