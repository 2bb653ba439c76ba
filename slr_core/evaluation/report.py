"""The report of a results file: a page of tables and plots, and the commands that reproduce them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import BaseModel

from slr_core.checkpoint.written_whole import written_whole
from slr_core.errors import ConfigError, DataError, SLRError
from slr_core.evaluation import plots, tables
from slr_core.evaluation.methods import METHODS, NOISY_START
from slr_core.evaluation.plots import Plot
from slr_core.evaluation.stability import StabilityReport
from slr_core.evaluation.state_analysis import StateAnalysis
from slr_core.evaluation.statistics import Summary, paired_test, summarize, summarize_by_difficulty
from slr_core.evaluation.store import MethodRun, Store, StoredFigure
from slr_core.evaluation.tables import FigureTable
from slr_core.validation import from_stored, shortened

_AUXILIARY = ("baselines", "missing")
"""Kinds of stored figures that complete others and are not shown by themselves."""


@dataclass(frozen=True)
class Section:
    """The part of a report about one set of questions.

    Attributes:
        title: task and source.
        questions: how many.
        rules: the scores of the shortcut rules on these questions.
        methods: one row per method.
        levels: the loop by difficulty.
        missing: methods without a figure, and why.
        plots: to draw below the tables.
    """

    title: str
    questions: int
    rules: dict[str, float]
    methods: FigureTable
    levels: FigureTable
    missing: dict[str, str]
    plots: list[Plot]


def write_report(store: Store, out: str | Path) -> list[Path]:
    """Write ``report.html``, which is self-contained, and ``report.md`` with its plots, into the folder ``out``.

    Returns:
        The files written.

    Raises:
        DataError: the results hold nothing to report.
        ConfigError: a file cannot be written, or is the results file; then none is written.
    """
    out = Path(out)
    entries: list[MethodRun | StoredFigure] = [*store.runs.values(), *store.figures]
    for entry in entries:
        _check(entry, store.path)
    try:
        sections = [section for group in _by_questions(store).values() if (section := _section(*group)) is not None]
        manifest = _manifest(store)
    except SLRError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"these results are not of this program, or of another version ({error!r})") from error
    if not sections:
        raise DataError("the results file holds nothing to report: no finished run, no figure")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["recolour"] = _recolour
    content = {"sections": sections, "manifest": manifest}
    files = {
        "report.html": environment.get_template("report.html").render(content),
        "report.md": environment.get_template("report.md").render(content, picture=_picture),
    }
    for i, section in enumerate(sections):
        files |= {_picture(i, j): plot.svg for j, plot in enumerate(section.plots)}
    return _write({out / name: text for name, text in files.items()}, store.path)


def _write(files: dict[Path, str], results: Path | None) -> list[Path]:
    """Write all files, or none of them."""
    for path in files:
        if results is not None and os.path.exists(path) and os.path.exists(results) and os.path.samefile(path, results):
            raise ConfigError(f"{path}: expected another folder for the report, this is the results file")
        if os.path.isdir(path):  # found before the first of them is replaced
            raise ConfigError(f"{path}: expected a file or nothing, got a folder")
    with ExitStack() as stack:
        for path, text in files.items():
            stack.enter_context(written_whole(path, folder=False)).write_text(text, encoding="utf-8")
    return list(files)


class _Model(BaseModel):
    name: str
    sha256: str = "-"


class _Settings(BaseModel):
    seed: int
    loop: dict[str, Any] = {}


class _AnySpec(BaseModel):
    """What the report reads of a spec; below: of a figure that it shows, and of a run."""

    task: str
    source: str
    questions: int
    questions_sha256: str


class _FigureSpec(_AnySpec):
    model: _Model
    settings: _Settings = _Settings(seed=0)


class _RunSpec(_FigureSpec):
    method: str
    settings: _Settings


_KINDS: dict[str, tuple[type[_AnySpec], Any]] = {
    "baselines": (_AnySpec, dict[str, float]),
    "missing": (_AnySpec, dict[str, str]),
    "stability": (_FigureSpec, StabilityReport),
    "probe": (_FigureSpec, StateAnalysis),
}
"""Kinds of figures: what the report reads of their specs, and their data."""


def _check(entry: MethodRun | StoredFigure, path: Path | None) -> None:
    """Check the types of what the report reads of an entry of a results file.

    Raises:
        DataError: one is another; the message names file and line.
    """
    try:
        if isinstance(entry, MethodRun):
            from_stored(_RunSpec, entry.spec)
        elif entry.kind in _KINDS:
            spec, data = _KINDS[entry.kind]
            from_stored(spec, entry.spec)
            from_stored(data, entry.data)
        else:
            raise DataError(f"figure: expected {', '.join(_KINDS)}, got {shortened(entry.kind)}")
    except DataError as error:
        where = "these results are" if entry.line is None else f"{path}, line {entry.line}:"
        raise DataError(f"{where} not of this program, or of another version ({error})") from error


def _picture(section: int, plot: int) -> str:
    return f"figure_{section + 1}_{plot + 1}.svg"


def _plain(text: str) -> str:
    """Escape a text for Markdown, also inside a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", " ".join(text.split()))


def _recolour(svg: str) -> str:
    """Use the page's text colour: a plot in a file of its own is grey, to be readable on light and dark."""
    return svg.replace(plots.GREY, "currentColor")


def _finished(run: MethodRun) -> bool:
    return len(run.outcomes) == int(run.spec["questions"])


def _by_questions(store: Store) -> dict[tuple[str, str], tuple[list[MethodRun], list[StoredFigure]]]:
    """Group runs and figures by task and questions: two tasks may read the same file."""
    groups: dict[tuple[str, str], tuple[list[MethodRun], list[StoredFigure]]] = defaultdict(lambda: ([], []))
    for run in store.runs.values():
        if _finished(run):
            groups[run.spec["task"], run.spec["questions_sha256"]][0].append(run)
    for figure in store.figures:
        groups[figure.spec["task"], figure.spec["questions_sha256"]][1].append(figure)
    return dict(groups)


def _section(runs: Sequence[MethodRun], figures: Sequence[StoredFigure]) -> Section | None:
    """``None`` if there is nothing to show."""
    shown = [figure for figure in figures if figure.kind not in _AUXILIARY]
    studies = [figure for figure in shown if figure.kind == "stability"]
    asked_for = [run for run in runs if not any(_is_point(run, study) for study in studies)]
    compared = _labelled_runs([run for run in asked_for if run.spec["method"] != NOISY_START.name])
    if not compared and not shown:
        return None
    spec = (runs[0] if compared else shown[0]).spec
    summaries = {name: summarize(list(run.outcomes.values())) for name, run in compared.items()}
    reference = _reference(compared)
    tests, levels = {}, {}
    if reference is not None:
        loop = list(reference.outcomes.values())
        others = {name: list(run.outcomes.values()) for name, run in compared.items() if run is not reference}
        tests, levels = (
            {name: paired_test(loop, other).p for name, other in others.items()},
            summarize_by_difficulty(loop),
        )
    named = {figure.kind: figure.data for figure in figures}
    rules: dict[str, float] = named.get("baselines", {})
    found = {run.spec["method"] for run in compared.values()}
    controls = [name for name, run in compared.items() if _is_control(run.spec["method"])]
    return Section(
        title=f"{spec['task']}: {spec['source']}",
        questions=int(spec["questions"]),
        rules=rules,
        methods=tables.method_table(summaries, tests),
        levels=tables.difficulty_table(levels),
        missing={name: why for name, why in named.get("missing", {}).items() if name not in found},
        plots=[
            *_plots(summaries, rules, controls),
            *(plot for figure, label in _labelled_figures(shown) for plot in _figure_plots(figure, rules, label)),
        ],
    )


def _is_point(run: MethodRun, study: StoredFigure) -> bool:
    """Whether a run is one of a stability study, forced to a depth: a point of its plot, not a row of the table."""
    if run.about or run.spec["method"] != "slr_fixed":  # the runs of a study have no description of their own
        return False
    settings, seed = run.spec["settings"], study.spec.get("settings", {}).get("seed", 0)
    depths = [int(depth) for depth in study.data["by_depth"]]
    forced = [{"criterion": "fixed", "max_iterations": t, "min_iterations": t} for t in depths]
    same = (run.spec["model"], settings["seed"]) == (study.spec["model"], seed)
    return same and settings["loop"] in forced


def _is_control(method: str) -> bool:
    return method in METHODS and METHODS[method].control


def _labelled_runs(runs: Sequence[MethodRun]) -> dict[str, MethodRun]:
    """Runs by method; runs of the same method are labelled with the settings in which they differ."""
    by_method: dict[str, list[MethodRun]] = defaultdict(list)
    for run in runs:
        by_method[run.spec["method"]].append(run)
    return {
        f"{method} ({label})" if label else method: run
        for method, same in by_method.items()
        for run, label in zip(same, _differences([run.spec for run in same]), strict=True)
    }


def _differences(specs: Sequence[dict[str, Any]]) -> list[str]:
    """Per spec, the settings in which the specs differ; unequal specs have unequal texts."""
    settings = [_settings(spec) for spec in specs]
    names = dict.fromkeys(name for values in settings for name in values)
    differ = [name for name in names if len({values.get(name) for values in settings}) > 1]
    if len({values.get("model") for values in settings}) == len(settings):
        differ = [name for name in differ if name != "weights"]
    labels = [", ".join(f"{name} {values.get(name, 'default')}" for name in differ) for values in settings]
    return [
        label if labels.count(label) == 1 else ", ".join(filter(None, (label, f"id {MethodRun(spec).id}")))
        for label, spec in zip(labels, specs, strict=True)
    ]


def _settings(spec: dict[str, Any]) -> dict[str, str]:
    model, settings = dict(spec.get("model", {})), dict(spec.get("settings", {}))
    settings |= settings.pop("loop", {})
    # What is left of the model is its precision, where that is chosen.
    settings = {"model": model.pop("name", None), "weights": model.pop("sha256", "-")[:8], **model, **settings}
    settings |= {"source": spec["source"], "version": spec.get("slr", "-")}
    return {name: str(value) for name, value in settings.items()}


def _reference(compared: dict[str, MethodRun]) -> MethodRun | None:
    """The run of the loop with which others are compared: the only one, or the only one with unchanged settings."""
    loops = [run for run in compared.values() if run.spec["method"] == "slr"]
    plain = [run for run in loops if not run.spec["settings"]["loop"]]
    return next((only for (only,) in (runs for runs in (loops, plain) if len(runs) == 1)), None)


def _plots(summaries: dict[str, Summary], rules: dict[str, float], controls: Sequence[str]) -> list[Plot]:
    if len(summaries) < 2:
        return []
    caption = (
        "Accuracy with its 95 % interval; hollow circles are controls. The paired test in the table (p) shows if a "
        "method differs from the loop: it compares question by question, and can find a difference between intervals "
        "that overlap."
    )
    return [Plot("Methods", caption, plots.draw_methods(summaries, controls=controls, rules=rules))]


def _labelled_figures(figures: Sequence[StoredFigure]) -> list[tuple[StoredFigure, str]]:
    """Figures in order, each with the settings in which it differs from the others of its kind."""
    labels: dict[int, str] = {}
    for kind in {figure.kind for figure in figures}:
        same = [i for i, figure in enumerate(figures) if figure.kind == kind]
        labels.update(zip(same, _differences([figures[i].spec for i in same]), strict=True))
    return [(figure, labels[i]) for i, figure in enumerate(figures)]


def _figure_plots(figure: StoredFigure, rules: dict[str, float], label: str) -> list[Plot]:
    drawn = _stability_plots(figure, rules) if figure.kind == "stability" else _state_plots(figure)
    return [replace(plot, title=f"{plot.title} ({label})") for plot in drawn] if label else drawn


def _stability_plots(figure: StoredFigure, rules: dict[str, float]) -> list[Plot]:
    study = StabilityReport.from_json(figure.data)
    correlation = "not defined" if study.correlation is None else f"{study.correlation:.2f}"
    return [
        Plot(
            "Past the trained depth",
            f"Accuracy when every loop is forced to a number of iterations; trained: {study.trained}. If the loop is "
            "stable, accuracy does not fall to the right of the mark, and the contraction rate stays below 1.",
            plots.draw_accuracy_by_depth(study.by_depth, study.trained, rules),
        ),
        Plot(
            "When to stop",
            f"Each exit criterion over its thresholds. As configured: {study.default.iterations:.2f} iterations on "
            f"average, {study.excess:.2f} more than needed; rank correlation with difficulty {correlation}.",
            plots.draw_exit_frontier(study.exits, study.default),
        ),
        Plot(
            "Noise in the first state",
            "Accuracy, and the share of answers that changed, against Gaussian noise in h_0.",
            plots.draw_noise_sensitivity(study.noise, study.default),
        ),
    ]


def _state_plots(figure: StoredFigure) -> list[Plot]:
    return list(StateAnalysis.from_json(figure.data).plots().values())


def _manifest(store: Store) -> FigureTable:
    # The runs of a study have no entry: the study has one for all.
    items: list[MethodRun | StoredFigure] = [*filter(_finished, store.runs.values()), *store.figures]
    entries = {}
    for item in (item for item in items if item.about):
        spec, about = item.spec, item.about
        entry = {
            "command": str(about.get("command", "")),
            "task": f"{spec['task']}: {spec['source']}",
            "questions": f"{spec['questions']}, sha256 {spec['questions_sha256'][:16]}",
            "model": f"{spec['model']['name']}, sha256 {str(spec['model'].get('sha256', '-'))[:16]}",
            "seed": str(spec["settings"]["seed"]) if "settings" in spec else "-",
            "versions": ", ".join(f"{k} {v}" for k, v in about.items() if k != "command"),
        }
        entries[str(entry)] = entry
    rows = list(entries.values())
    return FigureTable(tuple(rows[0]) if rows else (), tuple(tuple(row.values()) for row in rows))
