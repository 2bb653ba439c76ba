"""``slr export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from slr_core.cli.options import Model, hide_loading_bars


def export(
    to: Annotated[
        Literal["adapters", "coconut", "hf"],
        typer.Option(
            help="Form: adapters, a checkpoint of adapters and modules in half precision that names its base model; "
            "coconut, the state dict of Coconut's script; hf, a transformers folder, as Coconut and LOTUS publish."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    model: Model = None,
    base: Annotated[
        str | None,
        typer.Option(help="With --to adapters: the base model that the checkpoint was made of, a hub id or smollm2."),
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base's hub id.")] = None,
) -> None:
    """Write a checkpoint in a published form.

    The form must be able to express it: coconut and hf its loop, adapters its base, whose weights must not have been
    trained. coconut and hf print the command that imports the result again.
    """
    hide_loading_bars()
    if to == "adapters":
        _export_adapters(model, out, base, base_revision)
        return
    if base is not None or base_revision is not None:
        raise typer.BadParameter("--base and --base-revision belong to --to adapters")
    from slr_core.checkpoint.importers.export import export_checkpoint

    command = export_checkpoint(model, out, to)
    print(f"Wrote {out}. No file in it says how many thoughts there are; to import it again:\n    {command}")


def _export_adapters(model: str | None, out: Path, base: str | None, base_revision: str | None) -> None:
    from slr_core.checkpoint.publish import publish_checkpoint

    reference = publish_checkpoint(model, out, base, base_revision)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"Wrote {out}, {size / 1e6:.1f} MB. Its base is {reference.name}, revision {reference.revision}.")
    print(f"    slr serve --model {shlex.quote(str(out))}")
