"""``slr average``: the mean of the weights of checkpoints, in a folder of its own.

A uniform model soup (Wortsman et al., 2022, arXiv 2203.05482): runs that go on from the same weights often lie in one
valley of the loss, where the mean is as good as the best of them or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slr_core._version import __version__
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.write import save_checkpoint
from slr_core.checkpoint.written_whole import check_new, written_whole
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel

CARD = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

The mean of the weights of {names}, made by `slr average` {version}: {sizes}.
"""


def average_checkpoints(models: Sequence[str], out: str | Path) -> None:
    """Write a checkpoint whose weights are the mean of others; all else is the first one's.

    Args:
        models: two or more folders, hub ids or bundled names, with the same loop, shapes and vocabulary.
        out: the folder to write; it must be new or empty.

    Raises:
        ConfigError: there is only one checkpoint, two of them differ in more than their weights, or the folder cannot
            be written.
        CheckpointError: a checkpoint cannot be loaded.
    """
    if len(models) < 2:
        raise ConfigError("an average needs two or more checkpoints")
    out = Path(out)
    check_new(out)
    mean = load_checkpoint(LoopedModel, models[0])
    total = {key: x.double() for key, x in _weights(mean).items()}
    for model in models[1:]:
        other = load_checkpoint(LoopedModel, model)
        _check_alike(mean, other, f"{model} and {models[0]}")
        for key, x in _weights(other).items():
            total[key] += x.double()
    with torch.no_grad():
        for key, x in _weights(mean).items():
            x.copy_(total[key] / len(models))
    names = ", ".join(f"`{Path(model).resolve().name if Path(model).is_dir() else model}`" for model in models)
    with written_whole(out) as written:
        written.chmod(0o755)
        save_checkpoint(mean, written)
        card = CARD.format(name=out.name, names=names, version=__version__, sizes=describe_model(mean).sizes)
        (written / "README.md").write_text(card, encoding="utf-8")


def _weights(reasoner: LoopedModel) -> dict[str, Tensor]:
    return {key: x for key, x in reasoner.state_dict().items() if x.is_floating_point()}


def _check_alike(first: LoopedModel, other: LoopedModel, which: str) -> None:
    loops = [model.config.loop.model_dump(mode="json") for model in (first, other)]
    for key, value in loops[0].items():
        if loops[1][key] != value:
            raise ConfigError(f"{which} cannot be averaged: their settings loop.{key} differ")
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ConfigError(f"{which} cannot be averaged: their vocabularies differ")
    shapes = [{key: (x.shape, x.dtype) for key, x in _weights(model).items()} for model in (first, other)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(key) != shapes[1].get(key):
            raise ConfigError(f"{which} cannot be averaged: {key} has another shape or number format, or one lacks it")
