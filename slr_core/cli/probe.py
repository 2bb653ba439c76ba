"""``slr probe``."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    Results,
    Split,
    TaskName,
    baselines,
    check_folder,
    versions,
)
from slr_core.cli.options import Device, Dtype, Model, console, load_model, number, progress_bars
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.evaluation.inside import Inside
    from slr_core.evaluation.labels import Label
    from slr_core.evaluation.lens import Lens
    from slr_core.evaluation.probes import Probe, Score
    from slr_core.model.reasoner import LatentReasoner


def probe(
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
    iterations: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Number of iterations of every loop. Default: the checkpoint's maximum."),
    ] = None,
    probes: Annotated[
        str, typer.Option(help="Kinds of probes, separated by commas: linear, mlp, or none for the logit lens only.")
    ] = "linear,mlp",
    shuffles: Annotated[
        int, typer.Option(min=1, help="Number of control probes trained on shuffled labels, per probe.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data split, the shuffled labels and the probes.")] = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    json_file: JsonFile = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to write the plots to, as .svg files.")] = None,
) -> None:
    """Analyse the hidden states of a loop.

    Reads tokens from every state (logit lens), trains probes on the states, and measures how they move.
    """
    from slr_core.evaluation.inside import Inside
    from slr_core.evaluation.labels import LABELS
    from slr_core.evaluation.run import model_of
    from slr_core.evaluation.store import Store

    check_folder(json_file)
    kinds = _kinds(probes)
    store = Store(results)
    questions = Questions(task, data, split, generate, generate_seed, dial, limit)
    labels = LABELS.get(questions.task.name, ()) if kinds else ()
    reasoner, name, rules = load_model(model, device, dtype), model_of(model), baselines(questions)
    iterations = reasoner.config.loop.max_iterations if iterations is None else iterations
    settings = {"iterations": iterations, "probes": kinds, "shuffles": shuffles, "seed": seed}
    spec = {**questions.spec, "model": name, "settings": settings}
    kept = store.kept("probe", spec)
    if kept is None:
        found = _look(reasoner, questions, labels, iterations, kinds, seed, shuffles, batch_size)
        store.keep("baselines", questions.spec, rules, {})
        store.keep("probe", spec, found.to_json(), versions())
    else:
        found = Inside.from_json(kept)
    _print(found, questions, labels)
    if kinds and not labels:
        console.print(f"no probes: no labels are known for the task {questions.task.name}", highlight=False)
    if json_file is not None:
        record = {"manifest": {**spec, **versions()}, "baselines": rules, **found.to_json()}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        _draw(plots, found)


def _look(
    reasoner: LatentReasoner,
    questions: Questions,
    labels: Sequence[Label],
    iterations: int,
    kinds: Sequence[Probe],
    seed: int,
    shuffles: int,
    batch_size: int,
) -> Inside:
    from slr_core.evaluation import lens
    from slr_core.evaluation.inside import Inside
    from slr_core.evaluation.probes import collect, places_to_look, probe

    task, examples = questions.task, questions.examples
    with progress_bars() as bar:
        looping = bar.add_task("looping", total=len(examples))
        collected = collect(
            reasoner,
            task,
            examples,
            iterations=iterations,
            batch_size=batch_size,
            progress=lambda count: bar.advance(looping, count),
        )
        scores: list[Score] = []
        if labels:
            probing = bar.add_task("probing", total=len(places_to_look(collected, labels)))
            scores = probe(
                collected,
                examples,
                labels,
                probes=kinds,
                seed=seed,
                shuffles=shuffles,
                progress=lambda: bar.advance(probing),
            )
    return Inside(
        iterations=collected.iterations,
        accuracy=sum(collected.right) / len(examples),
        lens=lens.read(reasoner, task, examples, collected),
        movement=lens.movement(collected),
        trajectories=lens.trajectories(collected, task, examples),
        probes=tuple(scores),
    )


def _kinds(probes: str) -> list[Probe]:
    from slr_core.evaluation.probes import PROBES

    if probes == "none":
        return []
    named = [name.strip() for name in probes.split(",")]
    kinds = [kind for kind in PROBES if kind in named]
    if len(kinds) != len(named):
        raise ConfigError(f"--probes {probes}: expected none, or some of {', '.join(PROBES)}")
    return kinds


def _draw(folder: Path, found: Inside) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error}") from error
    for name, plot in found.drawn().items():
        (folder / f"{name}.svg").write_text(plot.svg, encoding="utf-8")


def _print(found: Inside, questions: Questions, labels: Sequence[Label]) -> None:
    console.print(
        f"{questions.task.name}: {questions.source}; {len(questions.examples)} questions, "
        f"{found.iterations} iterations each, {found.accuracy:.1%} answered right",
        highlight=False,
        soft_wrap=True,
    )
    _print_lens(found.lens)
    for label in labels:
        _print_scores(label, [score for score in found.probes if score.label == label.name])


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
