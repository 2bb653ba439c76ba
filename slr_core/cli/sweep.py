"""``slr sweep``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slr_core._install import missing_extra
from slr_core.cli.evaluate import JsonFile, check_folder, versions
from slr_core.cli.options import console

if TYPE_CHECKING:
    from slr_core.evaluation.sweep import Row


def sweep(
    spec: Annotated[
        Path,
        typer.Argument(
            help="Sweep file in YAML: the settings to vary and the evaluation.", exists=True, dir_okay=False
        ),
    ],
    json_file: JsonFile = None,
) -> None:
    """Train and compare variants of a recipe.

    Trains every combination of settings and seeds, evaluates each model, and compares them. Run the same command again
    to continue an interrupted sweep. `slr report` writes a report from its results.jsonl.
    """
    try:
        from slr_core.evaluation.sweep import run
    except ImportError as error:
        raise missing_extra("training", "train", error) from error
    check_folder(json_file)
    status = Console(stderr=True)
    rows = run(spec, about=versions(), progress=lambda doing: status.print(escape(doing)))
    _print(rows)
    if json_file is not None:
        record = {"manifest": {"spec": str(spec), **versions()}, "rows": [row.to_json() for row in rows]}
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _print(rows: list[Row]) -> None:
    groups: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values = row.variant.label or "as it is"
        groups[row.questions, row.method][values].append(row)
    for (questions, method), variants in groups.items():
        title = f"{questions}; {method}"
        table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("variant", no_wrap=True)
        for column in ("seeds", "accuracy", "spread", "lowest", "highest", "iterations", "converged", "diverged"):
            table.add_column(column, justify="right", no_wrap=True)
        for values, own in variants.items():
            scores = [row.summary.accuracy for row in own]
            cells = [fmean(scores), pstdev(scores), min(scores), max(scores)]
            means = [
                fmean(getattr(row.summary, name) for row in own) for name in ("iterations", "converged", "diverged")
            ]
            shown = [f"{means[0]:.2f}", f"{means[1]:.1%}", f"{means[2]:.1%}"]
            table.add_row(escape(values), str(len(own)), *(f"{cell:.3f}" for cell in cells), *shown)
        console.print(table)
