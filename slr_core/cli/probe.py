"""``slr probe``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
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
    Split,
    TaskName,
    check_folder,
    versions,
)
from slr_core.cli.options import Model, console, load, number, progress_bars
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.evaluation.lens import Lens, Movement, Trajectories
    from slr_core.evaluation.probes import Label, Probe, Score


def probe(
    model: Model = None,
    task: TaskName = "prosqa",
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    dial: Dials = None,
    limit: Limit = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, max=256, help="how far every loop runs  [default: the checkpoint's most]")
    ] = None,
    probes: Annotated[str, typer.Option(help="kinds with commas, or none: the lens alone")] = "linear,mlp",
    shuffles: Annotated[int, typer.Option(min=1, help="trainings on shuffled labels, per probe")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="of the split, the shuffles and the probes")] = 0,
    batch_size: BatchSize = 64,
    json_file: JsonFile = None,
    plots: Annotated[Path | None, typer.Option(help="write the figures to this folder, as .svg")] = None,
) -> None:
    """Look into the states: what they read as, what probes find in them, and how they move."""
    from slr_core.evaluation import lens as lenses
    from slr_core.evaluation.probes import LABELS, collect, places_to_look
    from slr_core.evaluation.probes import probe as train
    from slr_core.evaluation.run import model_of

    check_folder(json_file)
    kinds = _kinds(probes)
    questions = Questions(task, data, split, generate, generate_seed, dial, limit)
    labels = LABELS.get(questions.task.name, ()) if kinds else ()
    reasoner = load(model)
    examples = questions.examples
    with progress_bars() as bar:
        looping = bar.add_task("looping", total=len(examples))
        collected = collect(
            reasoner,
            questions.task,
            examples,
            iterations=iterations,
            batch_size=batch_size,
            progress=lambda count: bar.advance(looping, count),
        )
        scores: list[Score] = []
        if labels:
            probing = bar.add_task("probing", total=len(places_to_look(collected, labels)))
            scores = train(
                collected,
                examples,
                labels,
                probes=kinds,
                seed=seed,
                shuffles=shuffles,
                progress=lambda: bar.advance(probing),
            )
    lens = lenses.read(reasoner, questions.task, examples, collected)
    moved, paths = lenses.movement(collected), lenses.trajectories(collected, questions.task, examples)
    right = sum(collected.right) / len(examples)
    console.print(
        f"{questions.task.name}: {questions.source}; {len(examples)} questions, "
        f"{collected.iterations} iterations each, {right:.1%} answered right",
        highlight=False,
        soft_wrap=True,
    )
    _print_lens(lens)
    for label in labels:
        _print_scores(label, [score for score in scores if score.label == label.name])
    if kinds and not labels:
        console.print(f"no probes: no labels are known for the task {questions.task.name}", highlight=False)
    if json_file is not None:
        record = {
            "manifest": {
                "model": model_of(model),
                "task": questions.task.name,
                "source": questions.source,
                "questions": len(examples),
                "questions_sha256": questions.loaded.sha256,
                "iterations": collected.iterations,
                "seed": seed,
                "shuffles": shuffles,
                **versions(),
            },
            "accuracy": right,
            "lens": lens.to_json(),
            "movement": asdict(moved),
            "trajectories": None if paths is None else paths.to_json(),
            "probes": [asdict(score) for score in scores],
        }
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        _draw(plots, lens, moved, paths, scores)


def _kinds(probes: str) -> list[Probe]:
    from slr_core.evaluation.probes import PROBES

    if probes == "none":
        return []
    named = [name.strip() for name in probes.split(",")]
    kinds = [kind for kind in PROBES if kind in named]
    if len(kinds) != len(named):
        raise ConfigError(f"--probes {probes}: expected none, or some of {', '.join(PROBES)}")
    return kinds


def _draw(folder: Path, lens: Lens, moved: Movement, paths: Trajectories | None, scores: list[Score]) -> None:
    from slr_core.evaluation import plots

    figures: dict[str, Callable[[], str]] = {
        "lens": lambda: plots.lens_curves(lens),
        "steps": lambda: plots.change_and_contraction(moved),
    }
    if paths is not None:
        figures["trajectories"] = lambda: plots.pca_trajectories(paths)
    if scores:
        figures["probes"] = lambda: plots.probe_scores(scores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error}") from error
    for name, figure in figures.items():
        (folder / f"{name}.svg").write_text(figure(), encoding="utf-8")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_lens(lens: Lens) -> None:
    table = _table("\nlogit lens", "t", "entropy", "p(answer)", "settled", "p(frontier)")
    table.add_column("reads most often as")
    thinks = any(reading.thoughts for reading in lens.readings)
    if thinks:
        table.add_column("thinks most often")
    for reading in lens.readings:
        cells = [_shares(reading.common)] + ([_shares(reading.thoughts)] if thinks else [])
        figures = map(number, (reading.entropy, reading.answer, reading.settled, reading.frontier))
        table.add_row(str(reading.t), *figures, *cells)
    console.print(table)


def _shares(common: tuple[tuple[str, float], ...]) -> str:
    return escape("  ".join(f"{word.strip()} {share:.0%}" for word, share in common[:3]))


def _print_scores(label: Label, scores: list[Score]) -> None:
    title = f"\n{label.name}: {label.help}"
    if not scores:
        console.print(f"{title}\ntoo few questions, or all alike", highlight=False)
        return
    table = _table(title, "t", "place", "probe", scores[0].metric, "95 % interval", "shuffled", "chance", "tested on")
    for s in scores:
        low, high = s.interval
        figures = (number(s.score), f"{low:.3f} to {high:.3f}", number(s.shuffled), number(s.chance))
        table.add_row(str(s.t), s.place, s.probe, *figures, str(s.tested_on))
    console.print(table)
