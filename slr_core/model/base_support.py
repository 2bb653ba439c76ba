"""What the loop needs from its base model: which models it can run, masks, widths and end tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slr_core.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers in a config's ``layer_types``."""


def check_supported(base: PreTrainedModel) -> None:
    """Refuse base models whose output would be wrong in a loop.

    The loop sets its own attention masks and reads the LM head as a plain linear layer.

    Raises:
        ConfigError: a layer has neither full nor sliding attention, or the logits are capped or scaled.
    """
    check_config(base.config, type(base).__name__)
    if base.config._attn_implementation not in ("sdpa", "eager"):
        base.set_attn_implementation("sdpa")  # the other implementations do not take the loop's masks


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse the config of a base model, called ``name``, as :func:`check_supported` does: before there are weights.

    Raises:
        ConfigError: a layer has neither full nor sliding attention, or the logits are capped or scaled.
    """
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ConfigError(f"{name}: {field} is not supported, the head must be plainly linear")
    window = getattr(config, "sliding_window", None)
    if others := sorted(_layer_types(config) - {FULL, SLIDING}):
        raise ConfigError(f"{name}: layers without full attention are not supported as a base: {', '.join(others)}")
    if _slides(config) and not (isinstance(window, int) and window > 1):
        raise ConfigError(f"{name}: layers without full attention are not supported without a sliding_window")


def attention_window(config: PreTrainedConfig) -> int | None:
    """Width in positions of the sliding attention of a base's layers; ``None``: all layers have full attention.

    Within the window, sliding attention is full attention. The loop has no mask per layer, so that a request may have
    no more positions.
    """
    return int(config.sliding_window) if _slides(config) else None


def max_positions(config: PreTrainedConfig) -> int:
    """Positions that a request may have: those that the base can address, but no more than its sliding window."""
    addressed = int(getattr(config, "max_position_embeddings", 2**31))
    window = attention_window(config)
    return addressed if window is None else min(addressed, window)


def _layer_types(config: PreTrainedConfig) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _slides(config: PreTrainedConfig) -> bool:
    types = _layer_types(config)
    return SLIDING in types if types else getattr(config, "sliding_window", None) is not None


def attention_mask(base: PreTrainedModel, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask ``[B, q, S]`` bool in the form that the base's attention takes: ``[B, 1, q, S]``, bool or ``dtype``."""
    if base.config._attn_implementation != "eager":
        return mask[:, None]
    # Eager attention adds the mask to the scores.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None]


def find_final_norm(base: PreTrainedModel) -> nn.Module:
    """The norm after the last layer, whose output the LM head reads.

    Raises:
        ConfigError: the model has none under a known name.
    """
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):
        module = getattr(base.base_model, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ConfigError(f"{type(base).__name__}: feedback `raw` needs a final norm, and none is known for this model")


def find_position_embeddings(base: PreTrainedModel) -> nn.Module | None:
    """The learned embeddings of absolute positions that a base adds to its inputs (GPT-2); ``None``: it has none."""
    found = getattr(base.base_model, "wpe", None)
    return found if isinstance(found, nn.Module) else None


@contextmanager
def keep_input(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collect the inputs of ``module`` inside the block; ``None``: nothing."""
    seen: list[Tensor] = []
    if module is None:
        yield seen
        return
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def hidden_size(base: PreTrainedModel) -> int:
    """Width of the embeddings, and so of the states."""
    return int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index]


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the tokenizer's end token and those of the base's generation config."""
    configured = base.generation_config.eos_token_id if base.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (tokenizer.eos_token_id, *listed) if isinstance(i, int))


def computation_settings(config: Any) -> dict[str, Any]:
    """What the config of a base model says of the computation: no names and versions."""
    left_out = ("transformers_version", "architectures", "dtype", "use_cache")
    return {key: x for key, x in config.to_dict().items() if not key.startswith("_") and key not in left_out}


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides which ids a text becomes, and which text ids become, as JSON; the chat template is left out."""
    described = {"class": type(tokenizer).__name__, "special_tokens": tokenizer.special_tokens_map}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # sentencepiece without the fast form of it
        return {**described, "vocabulary": tokenizer.get_vocab()}
    parts = json.loads(backend.to_str())
    # Calls of the tokenizer leave these two behind.
    return {**described, **{name: part for name, part in parts.items() if name not in ("padding", "truncation")}}
