"""``slr train`` and ``slr eval``."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from slr_core.cli.options import (
    CriterionName,
    MaxIterations,
    MinIterations,
    Model,
    Patience,
    Threshold,
    console,
    load,
    loop_settings,
    number,
)
from slr_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from slr_core.evaluation.evaluate import Evaluation, Summary
    from slr_core.tasks.base import Example


def train(
    config: Annotated[Path, typer.Argument(help="a recipe, such as configs/prosqa.yaml", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="change a setting of the recipe: dotted.name=value; repeatable")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of output_dir")] = False,
) -> None:
    """Train a recipe and write its checkpoint folder."""
    try:
        from slr_core.training.trainer import train as run
    except ImportError as error:
        raise ConfigError(f"training needs the extra `train`: pip install 'slr[train]' ({error})") from error
    from slr_core.training.config import TrainConfig

    print(run(TrainConfig.from_yaml(config, tuple(overrides or ())), resume=resume))


def evaluate(
    model: Model = None,
    task: Annotated[str, typer.Option(help="what to grade by: prosqa")] = "prosqa",
    data: Annotated[Path | None, typer.Option(help="a .jsonl or .jsonl.gz file of questions")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="generate this many questions instead")] = None,
    generate_seed: Annotated[int, typer.Option(help="of the generated questions")] = 0,
    nodes: Annotated[int, typer.Option(help="generated: most nodes of a graph")] = 10,
    min_hops: Annotated[int, typer.Option(help="generated: shortest path, at least")] = 2,
    max_hops: Annotated[int, typer.Option(help="generated: shortest path, at most")] = 4,
    balanced: Annotated[
        bool, typer.Option("--balanced/--official", help="generated: without, or with, the depth shortcut")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="first questions of the file only")] = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions per batch")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Score a model, with confidence intervals and the task's shortcut rules beside it."""
    from slr_core.evaluation.evaluate import evaluate as run
    from slr_core.tasks.base import read_jsonl
    from slr_core.tasks.prosqa import GraphSpec, ProsQA
    from slr_core.tasks.prosqa import generate as make

    if task != ProsQA.name:
        raise ConfigError(f"--task must be prosqa, got {task}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist")
    if (data is None) == (generate is None):
        raise ConfigError("give exactly one of --data FILE and --generate N")
    examples: list[Example]
    if data is not None:
        examples = read_jsonl(data)[:limit]
        if not examples:
            raise DataError(f"{data}: no questions in it")
        source = data.parent.name + "/" + data.name
    else:
        spec = GraphSpec(nodes, min_hops, max_hops, balanced)
        examples = list(islice(make(spec, generate_seed), generate))
        source = (
            f"generated, seed {generate_seed}, {'balanced' if balanced else 'official'} form, "
            f"at most {nodes} nodes, {min_hops} to {max_hops} hops"
        )
    reasoner = load(model)
    settings = loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        answered = bar.add_task("answering", total=len(examples))
        report = run(
            reasoner,
            ProsQA(),
            examples,
            settings=settings,
            batch_size=batch_size,
            progress=lambda count: bar.advance(answered, count),
        )
    _print_evaluation(report, f"{ProsQA.name}: {source}")
    if json_file is not None:
        record = {"task": task, "source": source, "model": model or "prosqa (bundled)", "loop": vars(settings)}
        json_file.write_text(json.dumps(record | report.to_json(), indent=2) + "\n", encoding="utf-8")


def _print_evaluation(report: Evaluation, title: str) -> None:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("steps", "questions", "accuracy", "95 % interval", "iterations", "converged", "passes"):
        table.add_column(column, justify="right", no_wrap=True)
    for level, summary in report.by_difficulty.items():
        table.add_row(str(level), *_cells(summary))
    table.add_section()
    table.add_row("all", *_cells(report.overall), style="bold")
    console.print(table)
    for name, score in report.baselines.items():
        console.print(f"shortcut {name} : {score:.3f}")
    changes = "  ".join(map(number, report.overall.relative_change))
    if changes:
        console.print(f"mean relative change by iteration: {changes}")
    console.print(f"{report.seconds:.1f} s")


def _cells(summary: Summary) -> list[str]:
    low, high = summary.interval
    return [
        str(summary.questions),
        f"{summary.accuracy:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{summary.iterations:.2f}",
        f"{summary.converged:.1%}",
        f"{summary.forward_passes:.2f}",
    ]
