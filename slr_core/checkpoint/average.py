"""``slr average``: the mean of the weights of checkpoints, in a folder of its own.

A uniform model soup (Wortsman et al., 2022, arXiv 2203.05482): runs that go on from the same weights often lie in one
valley of the loss, where the mean is as good as the best of them or better.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slr_core._version import __version__
from slr_core.checkpoint.hub import checkpoint_folder
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.validate import checkpoint_sha256, read_files
from slr_core.checkpoint.write import save_checkpoint, save_without_base
from slr_core.checkpoint.written_whole import check_new, check_outside, written_whole
from slr_core.errors import ConfigError
from slr_core.model.base_support import computation_settings, describe_tokenizer
from slr_core.model.looped import LoopedModel
from slr_core.validation import differences, shortened

_EXIT_SETTINGS = {"max_iterations", "min_iterations", "convergence", "guard"}
"""Settings of a loop that say when it stops. No weight depends on them, and those of the first checkpoint count."""
_NO_COMPUTATION = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "init_lora_weights",
    "lora_dropout",
}
"""Fields of an adapter's config with no effect on what a trained adapter computes."""

CARD = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

The mean of the weights of {count} checkpoints, made by `slr average` {version}: {sizes}.
Nothing was evaluated: figures of the checkpoints below are not those of this one.

| checkpoint | SHA-256, as in the results of `slr eval` |
|---|---|
{rows}
"""


def average_checkpoints(models: Sequence[str], out: str | Path) -> None:
    """Write a checkpoint whose weights are the mean of others; all else is the first one's.

    If all refer to the same base (``base_sha256``), so does the mean.

    Args:
        models: two or more folders, hub ids or bundled names. Weights of the same name must have the same shape and
            number format, and the settings that they depend on must be the same.
        out: the folder to write; it must be new or empty, and outside of the checkpoints.

    Raises:
        ConfigError: there is only one checkpoint, two of them differ in more than their weights, or the folder cannot
            be written or is inside one of them.
        CheckpointError: a checkpoint cannot be loaded.
    """
    if len(models) < 2:
        raise ConfigError(f"models: expected two or more checkpoints, got {', '.join(models) or 'none'}")
    out = Path(out)
    check_new(out)
    folders = [checkpoint_folder(model) for model in models]  # an unknown name shows before anything is loaded
    for folder in folders:
        check_outside(out, folder)
    mean = load_checkpoint(LoopedModel, folders[0])
    total = {key: x.double() for key, x in _weights(mean).items()}
    for model, folder in zip(models[1:], folders[1:], strict=True):
        other = load_checkpoint(LoopedModel, folder)
        _check_alike(mean, other, models[0], model)
        for key, x in _weights(other).items():
            total[key] += x.double()
    with torch.no_grad():
        for key, x in _weights(mean).items():
            x.copy_(total[key] / len(models))
    examples = read_files(folders[0], "examples.json")
    card = _card(out.name, folders, mean)
    with written_whole(out) as written:
        if mean.config.base_sha256 is None:
            save_checkpoint(mean, written)
        else:
            save_without_base(mean, written, mean.config)
        for name, content in examples.items():
            (written / name).write_bytes(content)
        (written / "README.md").write_text(card, encoding="utf-8")


def _weights(reasoner: LoopedModel) -> dict[str, Tensor]:
    weights = {key: x for key, x in reasoner.state_dict().items() if x.is_floating_point()}
    if reasoner.config.base_sha256 is None:
        return weights
    return {key: x for key, x in weights.items() if not key.startswith("base.") or ".lora_" in key}


def _check_alike(first: LoopedModel, other: LoopedModel, first_name: str, name: str) -> None:
    """Check that the same weights would compute the same in both."""
    for setting, ours, theirs in differences(_computation(first), _computation(other)):
        differ = f"{setting} is {shortened(theirs)} in {name} and {shortened(ours)} in {first_name}"
        raise ConfigError(f"{name} and {first_name} cannot be averaged: {differ}")


def _computation(reasoner: LoopedModel) -> dict[str, Any]:
    """What a model computes with its weights, as JSON, and their shapes and number formats."""
    content = {
        "trained": reasoner.config.trained,
        "loop": reasoner.config.loop.model_dump(mode="json", exclude=_EXIT_SETTINGS),
        "base_sha256": reasoner.config.base_sha256,
        "base": computation_settings(reasoner.base.config),
        "tokenizer": describe_tokenizer(reasoner.tokenizer),
        "adapters": {
            name: {key: x for key, x in vars(config).items() if key not in _NO_COMPUTATION}
            for name, config in reasoner.adapter_configs.items()
        },
        "weights": {key: f"{x.dtype} {list(x.shape)}" for key, x in _weights(reasoner).items()},
    }
    as_json = json.dumps(content, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    return dict(json.loads(as_json))


def _card(name: str, folders: Sequence[Path], mean: LoopedModel) -> str:
    rows = "\n".join(f"| `{folder.resolve().name}` | `{checkpoint_sha256(folder)}` |" for folder in folders)
    sizes = describe_model(mean).sizes
    return CARD.format(name=name, count=len(folders), version=__version__, sizes=sizes, rows=rows)
