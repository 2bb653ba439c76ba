"""``slr export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slr_core.cli.options import Model


def export(
    to: Annotated[
        Literal["coconut", "hf"],
        typer.Option(
            help="Form: coconut, the state dict of its script; hf, a transformers folder, as Coconut and LOTUS publish."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    model: Model = None,
) -> None:
    """Write a checkpoint in a published form.

    The form must be able to express its loop. Prints the command that imports the result again.
    """
    from transformers.utils import logging

    from slr_core.checkpoint.importers.export import export_checkpoint

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    command = export_checkpoint(model, out, to)
    print(f"Wrote {out}. No file in it says how many thoughts there are; to import it again:\n    {command}")
