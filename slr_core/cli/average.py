"""``slr average``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slr_core.cli.options import complete_model, hide_loading_bars


def average(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more checkpoints: folders, hub ids or bundled names.", autocompletion=complete_model
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
) -> None:
    """Write the mean of the weights of several checkpoints.

    Average runs that go on from one another or from one checkpoint, adapters included: a mean of others answers
    nothing. They must have the same base config, adapters, tokenizer, number format and settings of the loop;
    when the loop stops, texts and examples are those of the first. Evaluate the result: slr eval --model DIR.
    """
    from slr_core.checkpoint.average import average_checkpoints

    hide_loading_bars()
    average_checkpoints(models, out)
    print(f"Wrote {out}.\n    slr serve --model {shlex.quote(str(out))}")
