"""``slr stability``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from slr_core.cli.evaluate import (
    BatchSize,
    Data,
    Dials,
    Generate,
    GenerateSeed,
    JsonFile,
    Limit,
    Questions,
    Results,
    Seed,
    Split,
    TaskName,
    baselines,
    check_folder,
    versions,
)
from slr_core.cli.options import Device, Dtype, Model, console, load_model, number, progress_bars

if TYPE_CHECKING:
    from slr_core.evaluation.stability import Stability


def stability(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    task: TaskName = "prosqa",
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    dial: Dials = None,
    limit: Limit = None,
    past: Annotated[int, typer.Option(min=1, max=32, help="Force loops to this many times their trained depth.")] = 4,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    json_file: JsonFile = None,
) -> None:
    """Test how stable a loop is.

    Forces the loop past its trained depth, adds noise to its first state, and measures when it stops by itself.
    """
    from slr_core.evaluation.backends import Local
    from slr_core.evaluation.run import model_of
    from slr_core.evaluation.stability import Study
    from slr_core.evaluation.store import Store

    check_folder(json_file)
    questions = Questions(task, data, split, generate, generate_seed, dial, limit)
    store, name = Store(results), model_of(model)
    with progress_bars() as bar:
        rows: dict[str, TaskID] = {}

        def progress(run: str, answered: int) -> None:
            if run not in rows:
                rows[run] = bar.add_task(run, total=len(questions.examples))
            bar.advance(rows[run], answered)
            bar.update(rows[run], visible=not bar.tasks[rows[run]].finished)

        local = Local(load_model(model, device, dtype))
        study = Study(local, questions.task, questions.loaded, name, store, batch_size=batch_size, progress=progress)
        found = study.run(past, seed)
    rules = baselines(questions)
    store.keep("baselines", questions.spec, rules, {})
    spec = {**questions.spec, "model": name, "settings": {"past": past, "seed": seed}}
    store.keep("stability", spec, found.to_json(), versions())
    _print_stability(found, questions)
    if json_file is not None:
        record = {"manifest": {**spec, **versions()}, "baselines": rules, **found.to_json()}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _print_stability(found: Stability, questions: Questions) -> None:
    title = f"{questions.task.name}: {questions.source}, {len(questions.examples)} questions"
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("forced to", "accuracy", "95 % interval", "diverged", "oscillating", "contraction"):
        table.add_column(column, justify="right", no_wrap=True)
    for t, s in found.by_depth.items():
        low, high = s.interval
        mark = " (trained)" if t == found.trained else ""
        cells = (f"{s.accuracy:.3f}", f"{low:.3f} to {high:.3f}", f"{s.diverged:.1%}", f"{s.oscillating:.1%}")
        table.add_row(f"{t}{mark}", *cells, number(s.contraction_rate))
    console.print(table)
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
