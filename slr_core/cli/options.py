"""Options that commands share, and what they print alike."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

if TYPE_CHECKING:
    from slr_core.model.reasoner import LatentReasoner
    from slr_core.params import ResolvedLoopParams

# Redirected output is for files and pipes: no reason to wrap it at 80 columns.
console = Console() if sys.stdout.isatty() else Console(width=160)

Model = Annotated[
    str | None, typer.Option(help="checkpoint folder or hub id, or prosqa or prontoqa, which ship  [default: prosqa]")
]
Prompt = Annotated[str, typer.Argument(help="the question; `-` reads it from standard input")]
MaxIterations = Annotated[int | None, typer.Option(min=0, max=256, help="most iterations; 0 is the plain base model")]
MinIterations = Annotated[int | None, typer.Option(min=0, max=256, help="fewest iterations")]
CriterionName = Annotated[str | None, typer.Option("--criterion", help="what is compared to the threshold")]
Threshold = Annotated[float | None, typer.Option(min=0.0, help="stop below this")]
Patience = Annotated[int | None, typer.Option(min=1, help="consecutive iterations below the threshold")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy")]
TopK = Annotated[int, typer.Option(min=0, help="sample from the k likeliest tokens; 0: all")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens that make up this mass")]
Seed = Annotated[int | None, typer.Option(help="of the sampling")]
Chat = Annotated[bool, typer.Option("--chat", help="ask through the checkpoint's chat template")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def load(model: str | None) -> LatentReasoner:
    """The model of ``--model``."""
    from transformers.utils import logging

    from slr_core.model.reasoner import LatentReasoner

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return LatentReasoner.from_pretrained(model)


def loop_settings(
    reasoner: LatentReasoner,
    max_iterations: int | None,
    min_iterations: int | None,
    criterion: str | None,
    threshold: float | None,
    patience: int | None,
) -> ResolvedLoopParams:
    """The loop's settings from the options, over the checkpoint's defaults."""
    from slr_core.params import LoopParams

    return LoopParams(
        max_iterations=max_iterations,
        min_iterations=min_iterations,
        criterion=criterion,  # type: ignore[arg-type]  # LoopParams checks it
        threshold=threshold,
        patience=patience,
    ).resolve(reasoner.config.loop)


def progress_bars() -> Progress:
    """Bars with what is left, on a terminal; nothing where the output goes into a file."""
    shown = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)


def number(value: float | None) -> str:
    """A cell of a table."""
    return "-" if value is None else f"{value:.3f}"


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=2))
