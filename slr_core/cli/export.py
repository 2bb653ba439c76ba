"""``slr export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from slr_core.cli.options import Model, hide_loading_bars

GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
"""Number formats of :data:`slr_core.checkpoint.gguf_layout.TensorType`, whose module takes seconds to import."""
ROUNDING_ADVICE: dict[GgufType, str] = {"F32": "", "F16": " Choose F32."}
"""What to choose where one of these formats rounds too much; for all others, F16 or F32."""


def export(
    to: Annotated[
        Literal["adapters", "coconut", "gguf", "hf"],
        typer.Option(
            help="Form: adapters, a checkpoint of adapters and modules in half precision that names its base model; "
            "coconut, the state dict of Coconut's script; gguf, a file for llama.cpp, of a checkpoint that answers "
            "without a loop; hf, a transformers folder, as Coconut and LOTUS publish."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty; with --to gguf, the file, which is new.")],
    model: Model = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model that the checkpoint was made of: with --to adapters, a hub id or smollm2; with --to "
            "gguf, its GGUF file or smollm2."
        ),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="With --to adapters: branch, tag or commit of the base's hub id.")
    ] = None,
    gguf_type: Annotated[
        GgufType | None,
        typer.Option(help="With --to gguf: number format of the weight matrices; F16 by default."),
    ] = None,
) -> None:
    """Write a checkpoint in a published form.

    The form must be able to express it: coconut and hf its loop, adapters its base, whose weights must not have been
    trained, gguf a model without a loop. coconut and hf print the command that imports the result again.
    """
    hide_loading_bars()
    if base_revision is not None and to != "adapters":
        raise typer.BadParameter("--base-revision belongs to --to adapters")
    if gguf_type is not None and to != "gguf":
        raise typer.BadParameter("--gguf-type belongs to --to gguf")
    if to == "adapters":
        _export_adapters(model, out, base, base_revision)
        return
    if to == "gguf":
        _export_gguf(model, out, base, gguf_type or "F16")
        return
    if base is not None:
        raise typer.BadParameter("--base belongs to --to adapters and --to gguf")
    from slr_core.checkpoint.importers.export import export_checkpoint

    command = export_checkpoint(model, out, to)
    print(f"Wrote {out}. No file in it says how many thoughts there are; to import it again:\n    {command}")


def _export_adapters(model: str | None, out: Path, base: str | None, base_revision: str | None) -> None:
    from slr_core.checkpoint.publish import publish_checkpoint

    reference = publish_checkpoint(model, out, base, base_revision)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"Wrote {out}, {size / 1e6:.1f} MB. Its base is {reference.name}, revision {reference.revision}.")
    print(f"    slr serve --model {shlex.quote(str(out))}")


def _export_gguf(model: str | None, out: Path, base: str | None, gguf_type: GgufType) -> None:
    from slr_core.checkpoint.gguf_export import export_gguf

    exported = export_gguf(model, out, base, gguf_type)
    print(f"Wrote {out}, {out.stat().st_size / 1e6:.1f} MB.")
    for setting in exported.left_out:
        print(f"Not in the file, for its client to apply: {setting}")
    if exported.rounding > 1:
        advice = ROUNDING_ADVICE.get(gguf_type, " Choose F16 or F32.")
        print(
            f"Rounding to {gguf_type} changed the weights {exported.rounding:.1f} times as much as the adapter did: "
            f"answers can be far from the checkpoint's.{advice}"
        )
    print(f"    llama-server -m {shlex.quote(str(out))}")
