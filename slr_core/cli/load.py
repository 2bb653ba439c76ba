"""``slr load``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from slr_core.cli.options import ApiKey, AsJson, Output, console, progress_bars, show_results
from slr_core.cli.questions import Data, TaskName
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.evaluation.load_generator import LoadReport, RequestOutcome

_BAR = 40


def load(
    url: Annotated[str, typer.Argument(help="URL of the server, such as http://127.0.0.1:8000.")],
    duration: Annotated[float, typer.Option(min=0.1, help="Time in seconds during which requests are sent.")] = 30.0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Number of clients; each sends its next request when it has an answer.")
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Requests per second at random times, independent of the answers; replaces --concurrency."
        ),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    hops: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=18, help="Hops of generated ProsQA questions; repeat the option for a mix. Default: 2, 3 and 4."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of questions and arrival times.")] = 0,
    api_key: ApiKey = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Maximum time in seconds to wait for an answer.")] = 60.0,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Measure a running server under load.

    Waits until the server has loaded its model, then sends questions and reports latencies, iterations and accuracy.
    The questions are those of --data, in random order, or else generated: by --task, or without it ProsQA questions.
    """
    import asyncio

    from slr_core.evaluation.load_generator import LoadPlan, run_load
    from slr_core.tasks import resolve_task
    from slr_core.tasks.sources import load_questions

    chosen = resolve_task("prosqa" if task is None and data is None else task, data)
    if hops and (data is not None or chosen.name != "prosqa"):
        raise ConfigError("--hops is for generated ProsQA questions")
    plan = LoadPlan(
        url,
        duration_s=duration,
        concurrency=concurrency,
        rate=rate,
        task=chosen,
        examples=() if data is None else load_questions(chosen, data=data).examples,
        hops=hops or (2, 3, 4),
        seed=seed,
        api_key=api_key,
        timeout_s=timeout,
    )
    with progress_bars() as bars:
        row = bars.add_task("waiting for the server", total=round(duration))
        answers = 0

        def progress(elapsed_s: float, request: RequestOutcome) -> None:
            nonlocal answers
            answers += 1
            bars.update(row, completed=min(elapsed_s, duration), description=f"{answers} ended")

        report = asyncio.run(run_load(plan, progress))
    show_results(report.to_json(), lambda: _print(report, url), as_json, output)


def _print(report: LoadReport, url: str) -> None:
    found = report.to_json()
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in found["outcomes"].items())
    console.print(
        f"{escape(url)}: {found['requests']} requests in {found['elapsed_s']:.1f} s ({outcomes}), "
        f"{found['answers_per_s']:.1f} answers a second",
        highlight=False,
    )
    if not report.answered:
        return
    console.print(
        "latency  " + "  ".join(f"{name} {1000 * s:.1f} ms" for name, s in found["latency_s"].items()), highlight=False
    )
    table = _table("iterations", "answers", "")
    most = max(found["iterations"].values())
    for t, count in found["iterations"].items():
        table.add_row(t, str(count), "█" * max(1, round(_BAR * count / most)))
    console.print(table)
    console.print(
        "exits  " + "  ".join(f"{reason} {count}" for reason, count in found["exit_reasons"].items()), highlight=False
    )
    table = _table("steps", "answers", "iterations", "accuracy", "median latency")
    for level, row in found["by_difficulty"].items():
        cells = (f"{row['iterations']:.2f}", f"{row['accuracy']:.3f}", f"{1000 * row['p50_s']:.1f} ms")
        table.add_row(level, str(row["answers"]), *cells)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table
