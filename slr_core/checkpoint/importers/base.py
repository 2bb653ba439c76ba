"""The base model of an import: its configuration, its tokenizer with marker tokens, and a check of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from slr_core.checkpoint.base_model import MAX_COUNT, check_implementations
from slr_core.checkpoint.importers.files import Weights
from slr_core.checkpoint.validate import checkpoint_error, read_json, short

MAX_UNUSED_TOKENS = 4096
"""Largest number of unused tokens that are added so that a marker gets its id."""


def read_config(folder: Path, model_type: str | None = None) -> PreTrainedConfig:
    """The configuration in a folder.

    Args:
        folder: has a ``config.json``.
        model_type: read it as one of this type, whatever it says; ``None``: as it says.

    Raises:
        CheckpointError: it is missing, empty or of an unknown type.
    """
    path = folder / "config.json"
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise checkpoint_error(path, "not the configuration of a model: it has no model_type")
    try:
        if model_type is not None:
            config = AutoConfig.for_model(model_type, **{key: x for key, x in data.items() if key != "model_type"})
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_implementations(config)
    except Exception as error:  # transformers raises most kinds, each of them a fault of the file
        raise checkpoint_error(path, f"not a usable configuration ({short(error)})") from error
    if hasattr(config, "auto_map"):  # names code of the project that wrote the checkpoint
        del config.auto_map
    if getattr(config, "num_hidden_layers", 0) > MAX_COUNT:
        raise checkpoint_error(path, f"num_hidden_layers must be at most {MAX_COUNT}")
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise checkpoint_error(folder, "it has no tokenizer")
    # AutoTokenizer also reads config.json, which may be of a type that transformers does not know.
    chosen = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = chosen.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:  # as above
        raise checkpoint_error(folder, f"its tokenizer cannot be read ({short(error)})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def add_markers(
    where: Path,
    tokenizer: PreTrainedTokenizerBase,
    markers: Mapping[str, int],
    *,
    fill: bool = False,
    special: bool = False,
) -> None:
    """Make sure that the tokenizer has these tokens at these ids.

    Args:
        where: names the tokenizer in messages.
        tokenizer: changed in place.
        markers: ids of the tokens.
        fill: give ids before that of a marker to unused tokens, for a table that is larger than the vocabulary.
        special: added markers are special tokens, which the text of an answer leaves out.

    Raises:
        CheckpointError: a token has another id, or its id is taken.
    """
    for token, expected in sorted(markers.items(), key=lambda item: item[1]):
        found = tokenizer.get_vocab().get(token)
        if found is None:
            size = len(tokenizer)
            if not size <= expected <= size + (MAX_UNUSED_TOKENS if fill else 0):
                raise checkpoint_error(
                    where, f"its tokenizer has {size} tokens, so {token} cannot get the id {expected}; is it the base?"
                )
            added = [*(f"<|unused-{i}|>" for i in range(size, expected)), token]
            tokenizer.add_tokens(added, special_tokens=special)
            found = tokenizer.get_vocab()[token]
        if found != expected:
            raise checkpoint_error(where, f"its tokenizer has {token} at id {found}, the checkpoint at {expected}")


class BaseFit:
    """The base model's architecture without weights, and what the weights of a checkpoint must be for it.

    Args:
        where: names the base in messages.
        config: changed in place: gets the vocabulary size of the weights.
        weights: the base model's weights of the checkpoint, by transformers' names; changed in place: tied tensors
            are kept once.

    Raises:
        CheckpointError: the weights are not those of such a model.

    Attributes:
        table: name of the embedding table.
        head: name of the LM head's weight.
        transposed: names of linear layers that store their weight transposed.
        base_vocab_size: rows of the embedding table before the marker tokens were added.
        vocab_size: rows of the embedding table.
        dtype: the widest of the weights.
    """

    def __init__(self, where: Path, config: PreTrainedConfig, weights: dict[str, Tensor]) -> None:
        self.where, self.config, self.weights = where, config, weights
        shell = _without_weights(where, config)
        self.table = _name_of(shell, shell.get_input_embeddings())
        self.head = _name_of(shell, shell.get_output_embeddings())  # type: ignore[no-untyped-call]
        self.transposed = {name for name, module in shell.named_modules() if isinstance(module, Conv1D)}
        if config.tie_word_embeddings:
            self._tie()
        if self.table not in weights:
            raise self._error(f"it has no tensor {self.table}")
        self.base_vocab_size, self.vocab_size = int(config.vocab_size), len(weights[self.table])
        config.vocab_size = self.vocab_size
        self.dtype = widest_dtype(weights.values())

    def _tie(self) -> None:
        head = self.weights.pop(self.head, None)
        if head is None:
            return
        table = self.weights.setdefault(self.table, head)
        if not torch.equal(table, head):
            raise self._error(f"{self.table} and {self.head} differ, and the base ties them")

    def check(self) -> None:
        """Compare names and shapes with the architecture's.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        expected = _without_weights(self.where, self.config).state_dict()
        if self.config.tie_word_embeddings:
            expected.pop(self.head)
        for what, keys in {
            "are missing": expected.keys() - self.weights.keys(),
            "are unknown": self.weights.keys() - expected.keys(),
        }.items():
            if keys:
                raise self._error(f"{len(keys)} tensors {what}, such as {min(keys)}")
        for name, tensor in self.weights.items():
            if tensor.shape != expected[name].shape:
                raise self._error(
                    f"{name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)} by this base"
                )

    def _error(self, what: str) -> Exception:
        return checkpoint_error(self.where, f"the checkpoint does not fit this base: {what}")


def drop_buffers(weights: Weights) -> None:
    """Drop buffers that older releases of transformers saved with GPT-2 and Llama."""
    weights.drop(r".*\.attn\.(masked_)?bias", "causal mask buffers", "transformers makes them")
    weights.drop(r".*\.rotary_emb\.inv_freq", "rotary frequencies", "transformers computes them")


def _without_weights(where: Path, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, attn_implementation="sdpa"
            )
    except Exception as error:  # transformers raises most kinds, each of them a fault of the configuration
        raise checkpoint_error(where, f"no causal language model can be built from it ({short(error)})") from error
    assert isinstance(model, PreTrainedModel)
    return model


def _name_of(model: PreTrainedModel, part: torch.nn.Module) -> str:
    (name,) = (name for name, module in model.named_modules() if module is part)
    return f"{name}.weight"


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all values of these tensors."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    # bfloat16 and float16 have no common half-precision form.
    return torch.float64 if torch.float64 in dtypes else torch.float32
