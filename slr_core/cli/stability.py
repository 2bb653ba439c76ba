"""``slr stability``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from slr_core.cli.answering import BatchSize, Results, Seed, versions
from slr_core.cli.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Output,
    QuantizationName,
    console,
    load_model,
    number,
    progress_bars,
    show_results,
)
from slr_core.cli.questions import Data, Generate, GenerateSeed, GeneratorOptions, Limit, QuestionSet, Split, TaskName

if TYPE_CHECKING:
    from slr_core.evaluation.stability import StabilityReport


def stability(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    generator_option: GeneratorOptions = None,
    limit: Limit = None,
    past: Annotated[int, typer.Option(min=1, max=32, help="Force loops to this many times their trained depth.")] = 4,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Test how stable a loop is.

    Forces the loop past its trained depth, adds noise to its first state, and measures when it stops by itself.
    """
    from slr_core.evaluation.backends import Local
    from slr_core.evaluation.run import identify_model
    from slr_core.evaluation.stability import StabilityStudy
    from slr_core.evaluation.store import Store

    questions = QuestionSet(task, data, split, generate, generate_seed, generator_option, limit)
    store, name = Store(results), identify_model(model, dtype, quantization)
    with progress_bars() as bar:
        rows: dict[str, TaskID] = {}

        def progress(run: str, answered: int) -> None:
            if run not in rows:
                rows[run] = bar.add_task(run, total=len(questions.examples))
            bar.advance(rows[run], answered)
            bar.update(rows[run], visible=not bar.tasks[rows[run]].finished)

        local = Local(load_model(model, device, dtype, quantization))
        study = StabilityStudy(
            local, questions.task, questions.loaded, name, store, batch_size=batch_size, progress=progress
        )
        found = study.run(past, seed)
    baselines = questions.baselines()
    store.save_figure("baselines", questions.spec, baselines, {})
    spec = {**questions.spec, "model": name, "settings": {"past": past, "seed": seed}}
    store.save_figure("stability", spec, found.to_json(), versions())
    record = {"manifest": {**spec, **versions()}, "baselines": baselines, **found.to_json()}
    show_results(record, lambda: _print(found, questions.title), as_json, output)


def _print(found: StabilityReport, title: str) -> None:
    console.print(_depth_table(found, title))
    default = found.default
    correlation = "-" if found.correlation is None else f"{found.correlation:.3f}"
    console.print(
        f"as configured: accuracy {default.accuracy:.3f}, {default.iterations:.2f} iterations, {found.excess:.2f} more "
        f"than the answers needed, {default.converged:.1%} converged; rank correlation of iterations with difficulty "
        f"{correlation}",
        highlight=False,
    )
    for scale, (s, changed) in found.noise.items():
        console.print(
            f"noise {scale:g} in h_0: accuracy {s.accuracy:.3f}, {changed:.1%} of answers change", highlight=False
        )
    if found.exits:
        console.print(_frontier_table(found))


def _depth_table(found: StabilityReport, title: str) -> Table:
    table = _table(title, "iterations", "accuracy", "95 % interval", "diverged", "oscillating", "contraction rate")
    for t, s in found.by_depth.items():
        low, high = s.interval
        mark = " (trained)" if t == found.trained else ""
        cells = (f"{s.accuracy:.3f}", f"{low:.3f} to {high:.3f}", f"{s.diverged:.1%}", f"{s.oscillating:.1%}")
        table.add_row(f"{t}{mark}", *cells, number(s.contraction_rate))
    return table


def _frontier_table(found: StabilityReport) -> Table:
    from slr_core.evaluation.stability import best_exits

    title = "\nexit criteria: best accuracy by mean iterations"
    table = _table(title, "criterion", "threshold", "mean iterations", "accuracy", "excess iterations")
    for point in best_exits(found.exits):
        figures = (f"{point.threshold:.3g}", f"{point.iterations:.2f}", f"{point.accuracy:.3f}", f"{point.excess:+.2f}")
        table.add_row(point.criterion, *figures)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column == "criterion" else "right", no_wrap=True)
    return table
