"""The model card of a training: what the checkpoint is, how it was made, what it scores, how to repeat that."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slr_core._version import __version__
from slr_core.checkpoint.info import describe_model
from slr_core.reasoner import LatentReasoner
from slr_core.training.config import TrainConfig
from slr_core.training.held_out import HeldOutResult

CARD = "README.md"

_TRAINED = {
    "full": "all weights",
    "adapters": "the loop's own weights; the base is unchanged",
    "adapters_and_embeddings": "the loop's own weights, embeddings and LM head",
}
_NOT_LOSSES = {"grad_norm", "learning_rate", "epoch", "step", "state_norm", "last_relative_change", "tokens_per_second"}


def write_training_card(
    folder: Path,
    reasoner: LatentReasoner,
    config: TrainConfig,
    manifest: dict[str, Any],
    held_out: Sequence[HeldOutResult],
    command: str | None,
) -> None:
    """Write the model card of a checkpoint folder.

    Args:
        folder: the checkpoint folder.
        reasoner: the trained model.
        config: its recipe.
        manifest: the content of ``training.json``.
        held_out: what was measured on held-out questions.
        command: the command that trained it; ``None``: ``slr train`` with the recipe of the card.
    """
    rows = {
        "base": _base(config),
        "size": describe_model(reasoner).sizes,
        "loop": _loop(reasoner, config),
        "trained": _TRAINED[config.train],
        "steps": f"{manifest['steps']:,} of {config.optimizer.batch_size} questions each, seed {config.seed}",
        "data": "<br>".join(
            entry["source"] + (f", SHA-256 `{entry['sha256']}`" if entry["sha256"] else "")
            for entry in manifest["data"]
        ),
        "last losses": ", ".join(
            f"{name} {value:.4g}" for name, value in manifest["last_log"].items() if name not in _NOT_LOSSES
        ),
        "held-out questions": "<br>".join(map(_held_out, held_out)) or "none: the recipe sets no `held_out`",
    }
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    recipe = config.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"output_dir": f"runs/{folder.name}"}
    text = _TEMPLATE.format(
        name=folder.name,
        version=__version__,
        table=table,
        recipe=yaml.safe_dump(recipe, sort_keys=False, width=100, default_flow_style=None).rstrip(),
        commands="\n".join(f"    {line}" for line in _commands(folder, held_out, command)),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _base(config: TrainConfig) -> str:
    if config.base.source is None:
        name = {"llama": "a Llama", "gpt2": "a GPT-2"}[config.base.model_type]
        return f"random weights, {name} with {config.base.num_hidden_layers} layers of width {config.base.hidden_size}"
    # The name alone: folders of the machine that trained it mean nothing elsewhere.
    local = Path(config.base.source)
    return f"`{local.resolve().name if local.exists() else config.base.source}`"


def _loop(reasoner: LatentReasoner, config: TrainConfig) -> str:
    loop = reasoner.config.loop
    if config.max_iterations == 0:
        return "not trained: this is the control without a loop (`max_iterations: 0`)"
    trained = min(loop.trained_iterations, config.longest)
    return f"workspace `{loop.workspace}`, trained for {trained} iterations, at most {loop.max_iterations}"


def _held_out(result: HeldOutResult) -> str:
    return f"{result.task}, {result.file or 'generated'}: {result}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _commands(folder: Path, held_out: Sequence[HeldOutResult], command: str | None) -> list[str]:
    quoted = shlex.quote(folder.name)
    lines = [command or "slr train RECIPE.yaml"]
    for result in held_out:
        if result.file is not None:
            data = shlex.quote(f"{folder.name}/{result.file}")
            lines.append(f"slr eval --model {quoted} --task {shlex.quote(result.task)} --data {data}")
    return [*lines, f"slr serve --model {quoted}"]


_TEMPLATE = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

A latent reasoner, trained by `slr train` {version}.

| | |
|---|---|
{table}

`training.json` has the whole recipe, every default included, and the versions of the libraries.

## Recipe

```yaml
{recipe}
```

## Commands

Training; then, in the folder that holds `{name}`, evaluation on the held-out questions and serving:

{commands}
"""
