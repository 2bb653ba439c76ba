"""``slr import``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from slr_core.cli.options import AsJson, console, show_results

if TYPE_CHECKING:
    from slr_core.checkpoint.importers.check import SelfCheck

PeerName = Literal["coconut", "simcot-coconut", "codi", "simcot-codi", "lotus", "pccot", "ouro"]
WrittenDtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


def import_(
    peer: Annotated[PeerName, typer.Argument(help="Project whose code wrote the checkpoint.")],
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a file, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model that it was trained from: a folder or a hub id. Its configuration and tokenizer are read, "
            "and its weights if the checkpoint is an adapter alone."
        ),
    ] = None,
    latents: Annotated[
        int | None,
        typer.Option(min=1, help="Number of thoughts, or of latent positions in all, where no file says it."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Number of loops over the latent positions, where no file says it.")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of the LoRA adapter, where no file says it.")] = None,
    keep_eos: Annotated[
        bool,
        typer.Option(
            "--keep-eos",
            help="The checkpoint was trained with the end token around the thoughts (CODI's --remove_eos False).",
        ),
    ] = False,
    keep_adapter: Annotated[
        bool,
        typer.Option(
            "--keep-adapter",
            help="Write CODI's adapter beside its base instead of merging it, so that several models share one base.",
        ),
    ] = False,
    expect: Annotated[
        Path | None,
        typer.Option(
            help="Recorded output of the project's own code, in JSON; the import must reproduce it.", dir_okay=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint's hub id.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base's hub id.")] = None,
    dtype: Annotated[
        WrittenDtype, typer.Option(help="Number format of the written weights; auto uses the widest in the checkpoint.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint of a published latent reasoner.

    Writes a checkpoint folder and checks it with one greedy answer. If anything fails, nothing is written.
    docs/importing.md has one command for each project.
    """
    import torch
    from transformers.utils import logging

    from slr_core.checkpoint.importers import Import, import_checkpoint
    from slr_core.checkpoint.importers.peer import ImportOptions

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check = import_checkpoint(
        Import(
            peer,
            checkpoint,
            base,
            out,
            ImportOptions(latents, iterations, lora_alpha, keep_eos, keep_adapter),
            revision,
            base_revision,
            None if dtype == "auto" else getattr(torch, dtype),
            expect,
        )
    )
    show_results(asdict(check), lambda: _print_check(check, out), as_json)


def _print_check(check: SelfCheck, out: Path) -> None:
    from slr_core.checkpoint.importers import describe_check
    from slr_core.checkpoint.importers.check import PROMPT

    rows = {
        "written": str(out),
        "marker tokens": ", ".join(f"{token} {i}" for token, i in check.markers.items()),
        "latents": f"{check.latents}, {check.iterations} iterations in every answer",
        "prompt": f"{PROMPT!r} as token ids {' '.join(map(str, check.prompt_ids))}",
        "greedy answer": f"{check.answer!r}, {check.forward_passes} forward passes",
        "comparison": describe_check(check),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
