"""``slr export --to gguf``: a checkpoint that answers without a loop as a file that llama.cpp runs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slr_core.checkpoint.gguf_layout import BaseFile, TensorType
from slr_core.checkpoint.pretrained import PACKAGED, is_packaged, packaged_file
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.write import base_state
from slr_core.checkpoint.written_whole import written_whole
from slr_core.config import SLRConfig, TextConfig
from slr_core.errors import ConfigError
from slr_core.loop.lora import lora_layers
from slr_core.model.looped import LoopedModel

NOT_IN_FILE = (
    "prompt_strip",
    "prompt_replace",
    "prompt_prefix",
    "prompt_suffix",
    "answer_prefix",
    "stop",
    "suppressed_token_ids",
)
"""Settings of a checkpoint's texts that a GGUF file has no place for."""
OF_THE_BASE = (
    "general.base_model.",
    "general.description",
    "general.doi",
    "general.finetune",
    "general.quantized_by",
    "general.repo_url",
    "general.url",
    "general.uuid",
    "quantize.imatrix.",
)
"""Metadata, or beginnings of its keys, that say which weights a file holds, and would be wrong of others."""


class GgufExport(NamedTuple):
    """What a written file does not hold of its checkpoint.

    Attributes:
        left_out: settings of the texts and their values, for the client of llama.cpp to apply.
        rounding: norm of what rounding changed of the adapted weights, in norms of what the adapter changed. Weights
            that came from a file of the same format are on its grid, so that a small change may be rounded away whole.
    """

    left_out: list[str]
    rounding: float


def export_gguf(
    model: str | None, out: str | Path, base: str | None = None, tensor_type: TensorType = "F16"
) -> GgufExport:
    """Write a checkpoint as a GGUF file, its adapter merged into the weights.

    Metadata and tokens are those of the base's own GGUF file; name, chat template and end token are the checkpoint's.

    Args:
        model: a folder, a hub id or a bundled name.
        out: the file to write; it must not exist.
        base: the GGUF file of the base model that the checkpoint was made of, or a key of :data:`PACKAGED`; ``None``:
            the one that its config refers to.
        tensor_type: number format of the matrices.

    Raises:
        ConfigError: the checkpoint's answers need a loop, or adapters that cannot be merged; the base's file is no
            GGUF file, or one of another model; a tensor cannot be written in its format; or the file cannot be
            written.
        CheckpointError: the checkpoint cannot be loaded.
    """
    out = Path(out)
    if os.path.exists(out):  # Path.exists raises if the name is too long
        raise ConfigError(f"{out}: expected a new file")
    if base is not None:
        _base_path(base)  # before weights are loaded
    reasoner = load_checkpoint(LoopedModel, model)
    _check_expressible(reasoner)
    file = BaseFile(_base_path(base or _named_base(reasoner.config)))
    file.check_config(reasoner.base.config)
    state, layers, adapter = base_state(reasoner.base), lora_layers(reasoner.base), reasoner.adapters.default
    head: nn.Module = reasoner.base.get_output_embeddings()  # type: ignore[no-untyped-call]
    table = reasoner.base.get_input_embeddings()
    keys = file.names(list(state), torch.equal(head.weight, table.weight))  # type: ignore[arg-type]
    for name, key in keys.items():
        if file.shape(name) != tuple(state[key].shape):
            raise file.refuse(
                f"its {name} has shape {list(file.shape(name))}, {key} of the checkpoint {list(state[key].shape)}"
            )
    file.check_vocabulary(reasoner.tokenizer)
    types, adapted = file.types(tensor_type), dict[str, float]()

    def weight(name: str) -> Tensor:
        key = keys[name]
        stem = key.removesuffix(".weight")
        values = state[key].float()
        if stem in layers and adapter is not None and adapter in layers[stem].lora_A:
            down, up = layers[stem].lora_A[adapter], layers[stem].lora_B[adapter]
            assert isinstance(down, nn.Linear)
            assert isinstance(up, nn.Linear)
            added = layers[stem].scaling[adapter] * (up.weight.float() @ down.weight.float())
            adapted[name] = float(added.square().sum())
            values = values + added
        return file.arranged(name, values)

    with written_whole(out, folder=False) as written, torch.no_grad():
        rounding = file.write(written, types, _changes(reasoner, file, out.stem, tensor_type), weight)
    change = sum(adapted.values())
    lost = math.sqrt(sum(rounding[name] for name in adapted) / change) if change else 0.0
    return GgufExport(_not_in_file(reasoner), lost)


def _named_base(config: SLRConfig) -> str:
    if config.base in PACKAGED and config.base_sha256 is not None:
        return config.base
    raise ConfigError(f"--base: name the GGUF file of this checkpoint's base model, a path or {', '.join(PACKAGED)}")


def _base_path(base: str) -> Path:
    if is_packaged(base):
        return packaged_file(base)
    if not Path(base).is_file():
        raise ConfigError(f"--base: {base}: expected a GGUF file or {', '.join(PACKAGED)}")
    return Path(base)


def _check_expressible(reasoner: LoopedModel) -> None:
    """Check that a plain forward pass of the base and at most one adapter is what answers."""
    config = reasoner.config
    if config.default_iterations != 0:
        raise ConfigError(
            f"loop.max_iterations is {config.loop.max_iterations}: llama.cpp runs no loop; it must be 0, as a recipe "
            "with `max_iterations: 0` trains it"
        )
    if config.loop.workspace == "token":
        raise ConfigError("loop.workspace `token` cannot be expressed: it must be append, block or prompt")
    if config.loop.decoder.answers != "lm_head":
        raise ConfigError(
            f"loop.decoder.answers `{config.loop.decoder.answers}` cannot be expressed: it must be lm_head"
        )
    if others := sorted(reasoner.adapters.names - {reasoner.adapters.default}):
        raise ConfigError(
            f"loop.lora: the adapter {others[0]} acts in some passes alone and cannot be merged; accepted are "
            "{kind: shared, covers: all} and {kind: none}"
        )
    if any(adapter.lora_bias for adapter in reasoner.adapter_configs.values()):
        raise ConfigError("an adapter with lora_bias cannot be merged into weights")


def _changes(
    reasoner: LoopedModel, file: BaseFile, name: str, tensor_type: TensorType
) -> dict[str, bool | int | str | None]:
    """Metadata that is not the base's."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    tokenizer = reasoner.tokenizer
    changes: dict[str, bool | int | str | None] = dict.fromkeys(
        k for k in file.metadata_keys if k.startswith(OF_THE_BASE)
    )
    changes |= {"general.name": name, "general.organization": None}
    if (of := file.field("general.name")) is not None:
        changes |= {"general.base_model.count": 1, "general.base_model.0.name": of}
        changes["general.base_model.0.organization"] = file.field("general.organization")
    kind = LlamaFileType[f"{'ALL' if tensor_type == 'F32' else 'MOSTLY'}_{tensor_type}"]
    changes |= {"general.file_type": int(kind), "general.quantization_version": GGML_QUANT_VERSION}
    begin = tokenizer.bos_token_id
    begins = isinstance(begin, int) and tokenizer("a").input_ids[:1] == [begin]
    changes["tokenizer.ggml.add_bos_token"] = begins
    if begins:
        changes["tokenizer.ggml.bos_token_id"] = begin
    changes["tokenizer.ggml.add_eos_token"] = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
    if isinstance(tokenizer.eos_token_id, int):
        changes["tokenizer.ggml.eos_token_id"] = tokenizer.eos_token_id
    changes["tokenizer.chat_template"] = _chat_template(reasoner)
    return changes


def _chat_template(reasoner: LoopedModel) -> str | None:
    try:
        return reasoner.tokenizer.get_chat_template(reasoner.config.text.chat_template or None)
    except ValueError:  # it has none, or several with names and no default
        return None


def _not_in_file(reasoner: LoopedModel) -> list[str]:
    text, plain = reasoner.config.text, TextConfig()
    found = [f"text.{key} {getattr(text, key)!r}" for key in NOT_IN_FILE if getattr(text, key) != getattr(plain, key)]
    if others := sorted(reasoner.end_tokens - {reasoner.tokenizer.eos_token_id}):
        found.append(f"end tokens {', '.join(map(str, others))}")
    return found
