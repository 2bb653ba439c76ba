"""The base model and the tokenizer of a checkpoint: size checks first, then transformers' own loading."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slr_core.checkpoint.folder import ADAPTER_CONFIG
from slr_core.checkpoint.tokenizer_growth import check_growth
from slr_core.checkpoint.tokenizer_patterns import check_patterns
from slr_core.checkpoint.validate import (
    DTYPES,
    FLOATS,
    WEIGHTS_INDEX,
    check_files,
    checkpoint_error,
    is_finite,
    read_headers,
    read_index,
    read_json,
    short,
)
from slr_core.errors import CheckpointError
from slr_core.panics import panics_as_errors

MAX_COUNT = 1024  # layers, experts, labels of a base model: made one by one, before any weight is looked at
_BUILT_IN = (None, "eager", "sdpa", "batched_mm", "grouped_mm")
"""Implementations that are part of transformers and torch."""
MAX_BUFFER_VALUES = 2**26  # values that a base model computes for itself, such as the angles of its positions
MAX_PACKED = 16  # parameters that one stored number may hold in a quantized base model


def load_base_model(folder: Path, source: str, inside: bool, dtype: torch.dtype | None) -> PreTrainedModel:
    """The base model of a checkpoint.

    Args:
        folder: the checkpoint, for messages.
        source: a folder or a hub id.
        inside: whether ``source`` is a folder of the checkpoint, which holds this base model alone.
        dtype: of its weights; ``None``: as saved.

    Raises:
        CheckpointError: it is missing, damaged, too large for its files, or does not run.
    """
    if inside:
        check_base_files(Path(source))
    try:
        if not inside:
            check_implementations(AutoConfig.from_pretrained(source, trust_remote_code=False))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises most kinds, each of them a fault of the folder
        raise checkpoint_error(folder, f"the base model {source} cannot be loaded ({short(error)})") from error
    model, info = loaded
    # What others publish may hold more than a causal language model.
    for fault in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if inside else [])):
        if info[fault]:
            raise checkpoint_error(source, f"the base model's weights have {fault}: {sorted(info[fault])[:3]}")
    assert isinstance(model, PreTrainedModel)
    for key, parameter in model.named_parameters():
        if parameter.dtype not in DTYPES and not _quantized(model.config):
            raise checkpoint_error(
                source, f"the base model's {key} has dtype {parameter.dtype}, expected one of {FLOATS}"
            )
        if not is_finite(parameter):
            raise checkpoint_error(
                source, f"the base model's {key} holds values that are not finite in {parameter.dtype}"
            )
    if stray := untied_head(model):
        raise checkpoint_error(
            source,
            f"its config ties {stray[0]} to {stray[1]}, and its files hold different values for them: leave one out, "
            "or set tie_word_embeddings to false",
        )
    positions = getattr(model.config, "max_position_embeddings", 1)
    if not isinstance(positions, int) or positions < 1:
        raise checkpoint_error(source, f"max_position_embeddings must be a positive integer, got {positions}")
    try:
        # Not every config that makes a model makes one that runs.
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long)
            state = model.base_model(input_ids=token, attention_mask=torch.ones_like(token)).last_hidden_state
    except Exception as error:  # as above
        raise checkpoint_error(source, f"the base model does not run ({short(error)})") from error
    if not state.isfinite().all():
        raise checkpoint_error(source, "the base model's states are not finite")
    if not _quantized(model.config):
        _own_weights(model)
    return model


def _own_weights(model: PreTrainedModel) -> None:
    """Copy the weights: the originals are views of a file that may be written again or truncated."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def check_base_files(path: Path) -> None:
    """Refuse a base model that claims to be larger than its files before anything of that size is allocated.

    Raises:
        CheckpointError: it does, or a file is missing, damaged or not a regular file.
    """
    check_files(path)
    for key, value in _integers(read_json(path / "config.json")):
        if re.search("(layers?|blocks|experts|labels)$", key) and value > MAX_COUNT:
            raise checkpoint_error(path / "config.json", f"{key} must be at most {MAX_COUNT}")
    if (path / ADAPTER_CONFIG).exists():
        raise checkpoint_error(path, f"a base model must not have an adapter of its own ({ADAPTER_CONFIG})")
    if (path / WEIGHTS_INDEX).exists():
        read_index(path / WEIGHTS_INDEX)
    stored = read_headers(sorted(path.glob("*.safetensors")))
    if not stored:
        raise checkpoint_error(path, "no weights of the base model (only safetensors are read)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_implementations(config)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, attn_implementation="sdpa"
            )
    except Exception as error:  # as above
        raise checkpoint_error(path, f"the base model cannot be built from its config ({short(error)})") from error
    claimed, held = sum(x.numel() for x in shell.parameters()), sum(prod(x.shape) for x in stored.values())
    # Names and shapes are left to transformers, which may convert them; a stored number may pack several.
    if claimed > (held * MAX_PACKED if _quantized(config) else held):
        raise checkpoint_error(path / "config.json", f"it describes {claimed} parameters, and the weights hold {held}")
    if sum(x.numel() for x in shell.buffers()) > MAX_BUFFER_VALUES:
        raise checkpoint_error(
            path / "config.json", f"it describes more than {MAX_BUFFER_VALUES} values besides the parameters"
        )
    for key in () if _quantized(config) else stored.keys() & shell.state_dict().keys():
        if stored[key].dtype not in FLOATS:
            raise checkpoint_error(
                path, f"the base model's {key} is stored as {stored[key].dtype}, expected one of {FLOATS}"
            )


def check_implementations(config: PreTrainedConfig) -> None:
    """Refuse a config that names an implementation of attention or experts which transformers would load from the hub:
    it is compiled code, and what a config names comes before what a caller asks for.

    Raises:
        ValueError: it does.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, key, None)
            if value not in _BUILT_IN:
                raise ValueError(f"{key} {value!r} is code outside of the checkpoint")


def untied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of two parameters that the config ties and that are separate: transformers unties them with a warning."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied.items():
        if model.get_parameter(target) is not model.get_parameter(source):
            return target, source
    return None


def _quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _integers(data: Any) -> Iterator[tuple[str, int]]:
    """Every integer in parsed JSON that has a name of its own."""
    left = [data]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from ((key, value) for key, value in item.items() if isinstance(value, int))
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has special tokens alone: what transformers makes of some kinds whose files are missing."""
    return not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)


def _check_tokenizer_file(path: Path) -> None:
    """Check the cost of a tokenizer, before its file is used."""
    if path.is_file():
        parts = json.loads(path.read_bytes())
        check_growth(path, parts)
        check_patterns(path, parts)


def load_tokenizer(folder: Path, embeddings: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, whose ids must be below ``embeddings``.

    Raises:
        CheckpointError: it cannot be loaded, may make texts much longer, has a pattern that may take time without end,
            or has more tokens than the base model.
    """
    try:
        _check_tokenizer_file(folder / "tokenizer.json")
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # Once on some text: what it adds by itself need not be in its vocabulary.
            ids = [*tokenizer.get_vocab().values(), *tokenizer("a").input_ids]
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise checkpoint_error(folder, f"the tokenizer cannot be loaded ({short(error)})") from error
    if is_empty(tokenizer):
        raise checkpoint_error(folder, "the files of the tokenizer are missing")
    if max(ids, default=0) >= embeddings:
        raise checkpoint_error(
            folder, f"the tokenizer has tokens up to {max(ids)}, the base model {embeddings} embeddings"
        )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
