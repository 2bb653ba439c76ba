"""``slr init``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

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
    recursive: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=64,
            help="Share the model's layers in this many loops, and run them in the workspace token. The loop is then "
            "on from the start.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the adapters of --recursive: a number, or full, which loses nothing. Default: full."
        ),
    ] = None,
    share: Annotated[
        Literal["average", "stepwise", "lower"] | None,
        typer.Option(
            help="Shared weights of --recursive: the average of the layers that they replace, layers at equal steps "
            "(stepwise), or the lower ones. Default: average."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the new weights.")] = 0,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Number format of the weights; auto keeps that of the base, float32 for a .gguf file."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Add a loop to a base model.

    Writes a checkpoint folder. It answers as the base model until `slr train` trains the loop. With --recursive, the
    loop is made of the model's own layers and on from the start: at full rank, it answers as the base model did.
    """
    from slr_core.checkpoint.init import Recursive, init_checkpoint
    from slr_core.engine.runner.device import resolve_dtype

    if recursive is None and (rank is not None or share is not None):
        raise typer.BadParameter("--rank and --share belong to --recursive")
    conversion = None if recursive is None else Recursive(recursive, _rank(rank), share or "average")
    hide_loading_bars()
    reasoner = init_checkpoint(base, out, config, recursive=conversion, seed=seed, dtype=resolve_dtype(dtype))

    def print_text() -> None:
        print_description(reasoner)
        source = shlex.quote(f"base.from={out}")
        recipe = "train the loop (docs/quickstart.md has a recipe)"
        if recursive is not None:
            recipe = "recover what it lost (docs/recursive.md has a recipe)"
        print(f"\nNext, {recipe}:\n    slr train RECIPE.yaml --set {source}")

    show_results(description(reasoner), print_text, as_json)


def _rank(value: str | None) -> int | None:
    if value is None or value == "full":
        return None
    if not value.isdecimal() or not int(value):
        raise typer.BadParameter(f"expected a number above 0, or full, got {value}", param_hint="--rank")
    return int(value)
