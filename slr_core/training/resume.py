"""What a run leaves in ``output_dir/steps`` so that ``slr train --resume`` can continue it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from slr_core.errors import ConfigError
from slr_core.training.config import TrainConfig

RECIPE = "recipe.json"

_MAY_CHANGE = {"output_dir", "threads", "save_steps", "log_steps"}
"""Settings that have no effect on the weights."""


def last_complete(steps: Path) -> Path | None:
    """The newest completely saved checkpoint in a folder: the Trainer writes its state last."""
    found = sorted(steps.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    for folder in found:
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file at once: whoever finds it finds a whole one.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_recipe(steps: Path, config: TrainConfig) -> None:
    """Write the recipe of a run that starts now, for :func:`check_recipe`.

    Raises:
        OSError: the folder cannot be written.
    """
    write_json(steps / RECIPE, _settings(config))


def check_recipe(steps: Path, config: TrainConfig) -> None:
    """Check that a run is resumed with the recipe that it was started with.

    With another one the weights would come from neither, and the model card would state the last one for the whole run.

    Raises:
        ConfigError: the run has no readable recipe, or a setting that has an effect on the weights is another.
    """
    try:
        before = json.loads((steps / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: the recipe of the run, {steps / RECIPE}, cannot be read ({error})") from error
    for name, old, new in _differences(before, _settings(config)):
        raise ConfigError(
            f"--resume: {name} was {json.dumps(old)} when the run was started, the recipe has {json.dumps(new)}: "
            "resume it with the recipe it was started with, or train the new one in another output_dir"
        )


def _settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True, exclude=_MAY_CHANGE)


def _differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the settings that differ, with both values; lists of unequal length differ as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(key, before.get(key), after.get(key)) for key in [*before, *(after.keys() - before)]]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(i), old, new) for i, (old, new) in enumerate(zip(before, after, strict=True))]
    else:
        if before != after:
            yield name, before, after
        return
    for key, old, new in pairs:
        yield from _differences(old, new, f"{name}.{key}" if name else key)
