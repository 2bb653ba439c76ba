"""``slr init``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slr_core.cli.info import description, print_description
from slr_core.cli.options import AsJson, DtypeName, hide_loading_bars, show_results


def init(
    base: Annotated[
        str, typer.Argument(help="Causal language model: a local folder, a hub id, a .gguf file, or smollm2.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Loop settings in YAML; one line such as `workspace: block` is enough.", dir_okay=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the new weights.")] = 0,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Number format of the weights; auto keeps that of the base, float32 for a .gguf file."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Add an untrained loop to a base model.

    Writes a checkpoint folder. It answers as the base model until `slr train` trains the loop.
    """
    from slr_core.checkpoint.init import init_checkpoint
    from slr_core.engine.runner.device import resolve_dtype

    hide_loading_bars()
    reasoner = init_checkpoint(base, out, config, seed=seed, dtype=resolve_dtype(dtype))

    def print_text() -> None:
        print_description(reasoner)
        source = shlex.quote(f"base.from={out}")
        print(f"\nNext, train the loop (docs/quickstart.md has a recipe):\n    slr train RECIPE.yaml --set {source}")

    show_results(description(reasoner), print_text, as_json)
