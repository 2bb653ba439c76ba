"""``slr train``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from slr_core._install import missing_extra
from slr_core.cli.options import hide_loading_bars


def train(
    config: Annotated[Path, typer.Argument(help="Recipe, such as configs/prosqa.yaml.", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of the recipe, as dotted.name=value; repeatable."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Train for the first steps of the recipe alone.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")] = False,
) -> None:
    """Train a recipe and write a checkpoint folder.

    The loss goes to standard error while the training runs. The folder holds a model card, README.md.
    """
    try:
        from accelerate import PartialState

        from slr_core.training.resume import last_complete
        from slr_core.training.trainer import train as run
    except ImportError as error:
        raise missing_extra("training", "train", error) from error
    from slr_core.training.config import TrainConfig

    hide_loading_bars()
    # For the card: whoever repeats the run starts it, and does not resume it.
    command = shlex.join(["slr", *(word for word in sys.argv[1:] if word != "--resume")])
    recipe = TrainConfig.from_yaml(config, tuple(overrides or ()))
    if max_steps is not None:
        recipe = recipe.shortened(max_steps)
    try:
        folder = run(recipe, resume=resume, command=command)
    except KeyboardInterrupt:
        last = last_complete(Path(recipe.output_dir) / "steps")
        left = "before the first checkpoint" if last is None else f"--resume continues from {last.name}"
        print(f"interrupted: {left}", file=sys.stderr)
        raise
    if not PartialState().is_main_process:
        return  # the main process writes the checkpoint, maybe still
    print(folder)
    print(f"Next:\n{''.join(f'    {line}{chr(10)}' for line in _next_commands(folder))}", end="", file=sys.stderr)


def _next_commands(folder: Path) -> list[str]:
    from slr_core.training.trainer import MANIFEST

    model = shlex.quote(str(folder))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    held_out = [result for result in manifest["held_out"] if result["file"] is not None]
    evaluate = (
        shlex.join(
            ["slr", "eval", "--model", str(folder), "--task", result["task"], "--data", str(folder / result["file"])]
        )
        for result in held_out
    )
    return [*evaluate, f"slr serve --model {model}"]
