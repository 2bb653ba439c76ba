"""Smaller students: a base with some of its attention heads and of the inner units of its MLPs left out.

Structured pruning of the width before distillation, as in Minitron (Muralidharan et al., 2024, arXiv 2407.14679). The
hidden size, and so vocabulary, embeddings and states, stay those of the whole base. What is kept is chosen by the size
of its weights.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slr_core.errors import ConfigError

_MLP = re.compile(r"(.*)\.down_proj\.weight")
_ATTENTION = re.compile(r"(.*)\.o_proj\.weight")


@torch.no_grad()
def prune(base: PreTrainedModel, heads: int, inner: int) -> PreTrainedModel:
    """A smaller copy of a base with the layers of Llama (separate q, k, v, o and gate, up, down projections).

    A group is a key head and the query heads that read it; groups are kept whole. Of each layer, the groups with the
    largest product of the norms of value and output weights are kept, and the inner units with the largest product of
    the norms of their gate, up and down weights; both in their order.

    Args:
        base: the whole model.
        heads: number of attention heads to keep in every layer.
        inner: number of inner units to keep in every MLP.

    Raises:
        ConfigError: the base has other layers or not so many heads or units, or ``heads`` splits a group or does not
            divide the hidden size.
    """
    weights, config = base.state_dict(), copy.deepcopy(base.config)
    attentions, mlps = ([m[1] for name in weights if (m := kind.fullmatch(name))] for kind in (_ATTENTION, _MLP))
    expected = [f"{at}.{part}_proj.weight" for at in attentions for part in "qkv"]
    expected += [f"{at}.{part}_proj.weight" for at in mlps for part in ("gate", "up")]
    if not attentions or not mlps or any(name not in weights for name in expected):
        raise ConfigError(f"base: {type(base).__name__} cannot be pruned, its layers are not like those of Llama")
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    if heads % queries or not 1 <= heads // queries <= groups or config.hidden_size % heads:
        raise ConfigError(
            f"base.num_attention_heads must be a multiple of {queries}, at most {groups * queries}, and divide the "
            f"hidden size {config.hidden_size}, got {heads}"
        )
    if inner > config.intermediate_size:
        raise ConfigError(f"base.intermediate_size must be at most {config.intermediate_size}, got {inner}")
    width = weights[f"{attentions[0]}.o_proj.weight"].shape[1] // (groups * queries)
    for at in attentions:
        value = weights[f"{at}.v_proj.weight"].view(groups, -1).norm(dim=1)
        output = weights[f"{at}.o_proj.weight"].T.reshape(groups, -1).norm(dim=1)
        kept = _largest(value * output, heads // queries)
        for part, per_group in (("q", queries), ("k", 1), ("v", 1), ("o", queries)):
            rows = _spread(kept, per_group * width)
            _select(weights, f"{at}.{part}_proj", rows, columns=part == "o")
    for at in mlps:
        size = weights[f"{at}.down_proj.weight"].norm(dim=0)
        for part in ("gate", "up"):
            size = size * weights[f"{at}.{part}_proj.weight"].norm(dim=1)
        units = _largest(size, inner)
        for part in ("gate", "up", "down"):
            _select(weights, f"{at}.{part}_proj", units, columns=part == "down")
    config.update(
        {
            "num_attention_heads": heads,
            "num_key_value_heads": heads // queries,
            "head_dim": width,
            "intermediate_size": inner,
        }
    )
    smaller = type(base)(config)
    smaller.load_state_dict(weights)
    module: nn.Module = smaller
    module.to(dtype=base.dtype).train(base.training)
    return smaller


def _largest(size: Tensor, count: int) -> Tensor:
    return size.topk(count).indices.sort().values


def _spread(kept: Tensor, length: int) -> Tensor:
    """The indices of the rows of each kept group of ``length`` rows."""
    return (kept[:, None] * length + torch.arange(length, device=kept.device)).flatten()


def _select(weights: dict[str, Tensor], name: str, index: Tensor, *, columns: bool) -> None:
    weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(int(columns), index)
    if not columns and f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"][index]
