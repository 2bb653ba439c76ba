"""``slr train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from slr_core._install import missing_extra


def train(
    config: Annotated[Path, typer.Argument(help="Recipe, such as configs/prosqa.yaml.", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the recipe, as dotted.name=value; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")] = False,
) -> None:
    """Train a recipe and write a checkpoint folder."""
    try:
        from slr_core.training.trainer import train as run
    except ImportError as error:
        raise missing_extra("training", "train", error) from error
    from slr_core.training.config import TrainConfig

    folder = run(TrainConfig.from_yaml(config, tuple(overrides or ())), resume=resume)
    print(folder)
    print(f"Next, serve it:\n    slr-serve --model {shlex.quote(str(folder))}", file=sys.stderr)
