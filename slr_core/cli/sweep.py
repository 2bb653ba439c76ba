"""``slr sweep``."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slr_core._install import missing_extra
from slr_core.cli.answering import versions
from slr_core.cli.options import (
    AsJson,
    Device,
    Dtype,
    Output,
    QuantizationName,
    check_not_replaced,
    console,
    show_results,
)

if TYPE_CHECKING:
    from slr_core.evaluation.sweep import SweepRow


def sweep(
    spec: Annotated[
        Path,
        typer.Argument(
            help="Sweep file in YAML: the settings to vary and the evaluation.", exists=True, dir_okay=False
        ),
    ],
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    finished: Annotated[
        bool, typer.Option("--finished", help="Show the models with complete figures; train and evaluate nothing.")
    ] = False,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Train the models side by side on a Ray cluster, each on one CPU and a GPU if any."),
    ] = False,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Train and compare variants of a recipe.

    Trains every combination of settings and seeds, evaluates each model, and compares them. A file with `models` in
    place of a recipe compares finished checkpoints. Run the same command again to continue an interrupted sweep.
    `slr report` writes a report from its results.jsonl. --device, --dtype and --quantization are for the evaluation.
    """
    try:
        from slr_core.evaluation.sweep import RESULTS, run_sweep
        from slr_core.evaluation.sweep_config import SweepConfig
    except ImportError as error:
        raise missing_extra("training", "train", error) from error
    if output is not None:
        check_not_replaced(output, Path(SweepConfig.from_yaml(spec).output_dir) / RESULTS, "the stored answers")
    status = Console(stderr=True)
    train_all = None
    if ray:
        try:
            from slr_core.training.on_ray import train_on_ray
        except ImportError as error:
            raise missing_extra("--ray", "ray", error) from error
        train_all = partial(train_on_ray, progress=lambda step: status.print(escape(step)))
    try:
        rows = run_sweep(
            spec,
            device=device,
            dtype=dtype,
            quantization=quantization,
            about=versions(),
            finished_only=finished,
            progress=lambda step: status.print(escape(step)),
            train_all=train_all,
        )
    except KeyboardInterrupt:
        status.print("interrupted: the same command continues")
        raise
    record = {"manifest": {"spec": str(spec), **versions()}, "rows": [row.to_json() for row in rows]}
    show_results(record, lambda: _print(rows), as_json, output)


def _print(rows: list[SweepRow]) -> None:
    groups: dict[tuple[str, str, str], dict[str, list[SweepRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values = row.variant.label or "unchanged"
        questions = f"{row.name}: {row.questions}" if row.name else row.questions
        groups[questions, row.questions_sha256, row.method][values].append(row)
    for (questions, _, method), variants in groups.items():
        title = f"{questions}; {method}"
        table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("variant", no_wrap=True)
        for column in (
            "seeds",
            "mean accuracy",
            "standard deviation",
            "lowest",
            "highest",
            "iterations",
            "converged",
            "diverged",
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for values, same in variants.items():
            scores = [row.summary.accuracy for row in same]
            cells = [fmean(scores), pstdev(scores), min(scores), max(scores)]
            means = [
                fmean(getattr(row.summary, name) for row in same) for name in ("iterations", "converged", "diverged")
            ]
            shown = [f"{means[0]:.2f}", f"{means[1]:.1%}", f"{means[2]:.1%}"]
            table.add_row(escape(values), str(len(same)), *(f"{cell:.3f}" for cell in cells), *shown)
        console.print(table)
