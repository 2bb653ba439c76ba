"""``slr probe``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from slr_core.cli.answering import BatchSize, Results, versions
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
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.evaluation.labels import Label
    from slr_core.evaluation.lens import Lens
    from slr_core.evaluation.probes import Probe, ProbeScore
    from slr_core.evaluation.state_analysis import StateAnalysis
    from slr_core.reasoner import LatentReasoner


def probe(
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
    as_json: AsJson = False,
    output: Output = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder to write the plots to, as .svg files.", file_okay=False)
    ] = None,
) -> None:
    """Analyse the hidden states of a loop.

    Reads tokens from every state (logit lens), trains probes on the states, and measures how they move.
    """
    from slr_core.evaluation.labels import LABELS
    from slr_core.evaluation.run import identify_model
    from slr_core.evaluation.state_analysis import StateAnalysis
    from slr_core.evaluation.store import Store

    kinds = _kinds(probes)
    store = Store(results)
    questions = QuestionSet(task, data, split, generate, generate_seed, generator_option, limit)
    labels = LABELS.get(questions.task.name, ()) if kinds else ()
    reasoner, name, baselines = (
        load_model(model, device, dtype, quantization),
        identify_model(model, dtype, quantization),
        questions.baselines(),
    )
    iterations = reasoner.config.loop.max_iterations if iterations is None else iterations
    settings = {"iterations": iterations, "probes": kinds, "shuffles": shuffles, "seed": seed}
    spec = {**questions.spec, "model": name, "settings": settings}
    kept = store.find_figure("probe", spec)
    if kept is None:
        found = _analyse(reasoner, questions, labels, iterations, kinds, seed, shuffles, batch_size)
        store.save_figure("baselines", questions.spec, baselines, {})
        store.save_figure("probe", spec, found.to_json(), versions())
    else:
        found = StateAnalysis.from_json(kept)

    def print_text() -> None:
        _print(found, questions, labels)
        if kinds and not labels:
            console.print(f"no probes: the task {questions.task.name} has no labels", highlight=False)

    record = {"manifest": {**spec, **versions()}, "baselines": baselines, **found.to_json()}
    show_results(record, print_text, as_json, output)
    if plots is not None:
        _draw(plots, found)


def _analyse(
    reasoner: LatentReasoner,
    questions: QuestionSet,
    labels: Sequence[Label],
    iterations: int,
    kinds: Sequence[Probe],
    seed: int,
    shuffles: int,
    batch_size: int,
) -> StateAnalysis:
    from slr_core.evaluation import lens
    from slr_core.evaluation.probes import collect_states, probe_places, train_probes
    from slr_core.evaluation.state_analysis import StateAnalysis

    task, examples = questions.task, questions.examples
    with progress_bars() as bar:
        looping = bar.add_task("looping", total=len(examples))
        collected = collect_states(
            reasoner,
            task,
            examples,
            iterations=iterations,
            batch_size=batch_size,
            progress=lambda count: bar.advance(looping, count),
        )
        scores: list[ProbeScore] = []
        if labels:
            probing = bar.add_task("probing", total=len(probe_places(collected, labels)))
            scores = train_probes(
                collected,
                examples,
                labels,
                probes=kinds,
                seed=seed,
                shuffles=shuffles,
                progress=lambda: bar.advance(probing),
            )
    return StateAnalysis(
        iterations=collected.iterations,
        accuracy=sum(collected.right) / len(examples),
        lens=lens.read_lens(reasoner, task, examples, collected),
        movement=lens.measure_movement(collected),
        trajectories=lens.project_trajectories(collected, task, examples),
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


def _draw(folder: Path, found: StateAnalysis) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error}") from error
    for name, plot in found.plots().items():
        (folder / f"{name}.svg").write_text(plot.svg, encoding="utf-8")


def _print(found: StateAnalysis, questions: QuestionSet, labels: Sequence[Label]) -> None:
    console.print(
        f"{questions.task.name}: {questions.source}; {len(questions.examples)} questions, "
        f"{found.iterations} iterations each, accuracy {found.accuracy:.3f}",
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
    title = "\nlogit lens (first: the token that the model writes first)"
    table = _table(title, "t", "entropy", "p(first)", "first on top", "p(frontier)")
    table.add_column("top tokens")
    has_thoughts = any(reading.thoughts for reading in lens.readings)
    if has_thoughts:
        table.add_column("thoughts")
    for reading in lens.readings:
        cells = [_format_shares(reading.common)] + ([_format_shares(reading.thoughts)] if has_thoughts else [])
        figures = map(number, (reading.entropy, reading.answer, reading.settled, reading.frontier))
        table.add_row(str(reading.t), *figures, *cells)
    console.print(table)


def _format_shares(common: tuple[tuple[str, float], ...]) -> str:
    return escape("  ".join(f"{word.strip()} {share:.0%}" for word, share in common[:3]))


def _print_scores(label: Label, scores: list[ProbeScore]) -> None:
    title = f"\n{label.name}: {label.help}"
    if not scores:
        console.print(f"{title}\ntoo few questions, or the same value for all", highlight=False)
        return
    table = _table(
        title, "t", "place", "probe", scores[0].metric, "95 % interval", "shuffled labels", "chance", "test questions"
    )
    for s in scores:
        low, high = s.interval
        figures = (number(s.score), f"{low:.3f} to {high:.3f}", number(s.shuffled), number(s.chance))
        table.add_row(str(s.t), s.place, s.probe, *figures, str(s.tested_on))
    console.print(table)
