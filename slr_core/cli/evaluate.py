"""``slr eval``, ``slr compare`` and ``slr report``."""

# Over 400 lines: three commands that share their options, most of it the text of their help.

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from rich.markup import escape
from rich.table import Table

from slr_core._version import __version__
from slr_core.cli.options import (
    CriterionName,
    Device,
    Dtype,
    MaxIterations,
    MinIterations,
    Model,
    Patience,
    Threshold,
    console,
    load_model,
    number,
    progress_bars,
)
from slr_core.errors import ConfigError, RequestError
from slr_core.tasks import TASKS

if TYPE_CHECKING:
    from slr_core.evaluation.backends import Backend
    from slr_core.evaluation.methods import Method, Settings
    from slr_core.evaluation.outcomes import Outcome
    from slr_core.evaluation.statistics import Summary
    from slr_core.evaluation.store import Store
    from slr_core.evaluation.tables import Table as Figures
    from slr_core.tasks.base import Task

MethodName = Literal[
    "no_cot",
    "cot",
    "self_consistency",
    "beam",
    "best_of_n",
    "pause",
    "slr",
    "slr_fixed",
    "slr_vote",
    "no_thought",
    "pause_as_thought",
    "multipass_pause",
    "shuffled_thoughts",
    "noised_thoughts",
    "foreign_thoughts",
]


def _complete_task(incomplete: str) -> list[str]:
    return [name for name in TASKS if name.startswith(incomplete)]


def _complete_split(context: typer.Context, incomplete: str) -> list[str]:
    names = [split for task in _tasks_of(context) for split in task.hub]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _complete_dial(context: typer.Context, incomplete: str) -> list[str]:
    names = [f"{dial}=" for task in _tasks_of(context) for dial in task.dials]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _complete_methods(incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in ("all", *get_args(MethodName)) if name.startswith(last)]


def _tasks_of(context: typer.Context) -> list[Task]:
    named = TASKS.get(context.params.get("task") or "")
    return list(TASKS.values()) if named is None else [named]


def _list_by_task(names: Callable[[Task], Iterable[str]]) -> str:
    listed = {task.name: ", ".join(names(task)) for task in TASKS.values()}
    return "; ".join(f"{task}: {values}" for task, values in listed.items() if values)


TaskName = Annotated[
    str,
    typer.Option("--task", help=f"Task, which grades the answers: {', '.join(TASKS)}.", autocompletion=_complete_task),
]
Data = Annotated[Path | None, typer.Option(help="File of questions, .jsonl or .jsonl.gz.")]
Split = Annotated[
    str | None,
    typer.Option(
        help=f"Split of the task's public data set on the hub. {_list_by_task(lambda task: task.hub)}.",
        autocompletion=_complete_split,
    ),
]
Generate = Annotated[int | None, typer.Option(min=1, help="Generate this many questions.")]
GenerateSeed = Annotated[int, typer.Option(help="Seed of the generated questions.")]
Dials = Annotated[
    list[str] | None,
    typer.Option(
        "--dial",
        help="Generator option, as name=value; repeatable. " + _list_by_task(lambda task: task.dials) + ".",
        autocompletion=_complete_dial,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first questions, this many.")]
Server = Annotated[str | None, typer.Option(help="Evaluate a running server at this URL instead of loading --model.")]
Results = Annotated[
    Path | None,
    typer.Option(help="File (.jsonl) that stores every answer; a repeated command continues from it."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random choices of the methods.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of questions per batch.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File to write the figures to, as JSON.")]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        help="Checkpoint of a method that needs its own, as method=DIR, such as no_thought=runs/x; repeatable."
    ),
]


class Questions:
    """What is asked: the task, its examples, and where they come from."""

    def __init__(
        self,
        task: str,
        data: Path | None,
        split: str | None,
        generate: int | None,
        seed: int,
        dials: list[str] | None,
        limit: int | None,
    ) -> None:
        from slr_core import tasks
        from slr_core.tasks.sources import load as load_questions

        if sum(source is not None for source in (data, split, generate)) != 1:
            raise ConfigError("give exactly one of --data FILE, --split NAME and --generate N")
        self.task: Task = tasks.get(task)
        self.loaded = load_questions(
            self.task,
            data=data,
            split=split,
            generate=generate,
            seed=seed,
            dials=dict(_dial(text) for text in dials or ()),
            limit=limit,
        )
        self.examples, self.source = self.loaded.examples, self.loaded.source

    @property
    def spec(self) -> dict[str, Any]:
        """What a results file knows them by."""
        facts = {"task": self.task.name, "source": self.source, "questions": len(self.examples)}
        return {**facts, "questions_sha256": self.loaded.sha256}


def _dial(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--dial {text}: expected name=value")
    return name, value


def evaluate(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    method: Annotated[MethodName, typer.Option(help="Method that answers the questions.")] = "slr",
    server: Server = None,
    task: TaskName = "prosqa",
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    dial: Dials = None,
    limit: Limit = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    json_file: JsonFile = None,
) -> None:
    """Score a model on a task.

    Prints accuracy with confidence intervals, and the scores of the task's shortcut rules on the same questions.
    """
    from slr_core.evaluation import methods
    from slr_core.evaluation.backends import Local
    from slr_core.evaluation.statistics import by_difficulty, summarize
    from slr_core.evaluation.store import Store

    check_folder(json_file)
    how = methods.get(method)
    questions = Questions(task, data, split, generate, generate_seed, dial, limit)
    loop = {
        "max_iterations": max_iterations,
        "min_iterations": min_iterations,
        "criterion": criterion,
        "threshold": threshold,
        "patience": patience,
    }
    settings = methods.Settings({name: value for name, value in loop.items() if value is not None}, seed=seed)
    backend = _backend(model, server, device, dtype)
    store = Store(results)
    outcomes = _answer(how, backend, questions, settings, store, server or model, batch_size)
    levels, overall, rules = by_difficulty(outcomes), summarize(outcomes), baselines(questions)
    store.keep("baselines", questions.spec, rules, {})
    _print_levels(levels, overall, rules, f"{questions.task.name}: {questions.source}")
    if isinstance(backend, Local) and (rows := backend.rows_per_step) is not None:
        console.print(f"mean rows per step: {rows:.1f} of {backend.engine.slots}", highlight=False)
    if json_file is not None:
        figures = {"overall": asdict(overall), "by_difficulty": {k: asdict(v) for k, v in levels.items()}}
        record = {"method": method, **_manifest(questions, server or model, settings), **figures, "baselines": rules}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def compare(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Methods, separated by commas, or all: {', '.join(get_args(MethodName))}.",
            autocompletion=_complete_methods,
        ),
    ] = "all",
    weights: Weights = None,
    server: Server = None,
    task: TaskName = "prosqa",
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    dial: Dials = None,
    limit: Limit = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Number of samples of self_consistency, best_of_n and slr_vote.")
    ] = 5,
    temperature: Annotated[float, typer.Option(min=0.001, help="Sampling temperature of the chains of thought.")] = 0.7,
    beams: Annotated[int, typer.Option(min=1, help="Number of beams of the method beam.")] = 4,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Noise in the states of slr_vote, as a share of their RMS.")
    ] = 0.1,
    cot_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a chain of thought, in tokens.")] = 256,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    json_file: JsonFile = None,
) -> None:
    """Compare methods and controls on a task.

    All methods answer the same questions; paired tests compare each method with the loop.
    """
    from slr_core.evaluation.methods import METHODS, Settings, get
    from slr_core.evaluation.statistics import paired, summarize
    from slr_core.evaluation.store import Store

    check_folder(json_file)
    chosen = list(METHODS.values()) if methods == "all" else [get(name.strip()) for name in methods.split(",")]
    own = dict(_weight(text) for text in weights or ())
    questions = Questions(task, data, split, generate, generate_seed, dial, limit)
    settings = Settings({}, cot_tokens, samples, temperature, beams, noise, seed)
    store, tested = Store(results), _backend(model, server, device, dtype)
    outcomes: dict[str, list[Outcome]] = {}
    missing: dict[str, str] = {}
    for method in chosen:
        reason = _cannot(method, own, server)
        if reason is not None:
            missing[method.name] = reason
            continue
        backend = tested if method.weights is None else _backend(str(own[method.weights]), None, device, dtype)
        name = (server or model) if method.weights is None else str(own[method.weights])
        try:
            outcomes[method.name] = _answer(method, backend, questions, settings, store, name, batch_size)
        except (ConfigError, RequestError) as error:
            missing[method.name] = str(error)
    summaries = {name: summarize(of) for name, of in outcomes.items()}
    against = outcomes.get("slr")
    tests = {name: paired(against, of) for name, of in outcomes.items() if against is not None and name != "slr"}
    rules = baselines(questions)
    store.keep("baselines", questions.spec, rules, {})
    store.keep("missing", questions.spec, missing, {})
    title = f"{questions.task.name}: {questions.source}, {len(questions.examples)} questions"
    _print_methods(summaries, {name: test.p for name, test in tests.items()}, rules, title)
    for name, reason in missing.items():
        console.print(f"{name}: no figure, {escape(reason)}", highlight=False)
    if json_file is not None:
        figures: dict[str, Any] = {name: asdict(summary) for name, summary in summaries.items()}
        for name, test in tests.items():
            figures[name]["paired_with_slr"] = asdict(test)
        record = {**_manifest(questions, server or model, settings), "baselines": rules}
        record |= {"figures": figures, "missing": missing}
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _cannot(method: Method, own: dict[str, Path], server: str | None) -> str | None:
    if method.weights is not None and method.weights not in own:
        return f"it needs weights trained for it: --weights {method.weights}=DIR"
    if server is not None and method.weights is None and not method.remote:
        return "it reaches into the model, which a server does not allow"
    return None


def _weight(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ConfigError(f"--weights {text}: expected method=DIR")
    return name, Path(folder)


def _backend(model: str | None, server: str | None, device: str, dtype: str) -> Backend:
    from slr_core.evaluation.backends import Local, Remote

    return Local(load_model(model, device, dtype)) if server is None else Remote(server)


def _answer(
    method: Method,
    backend: Backend,
    questions: Questions,
    settings: Settings,
    store: Store,
    model: str | None,
    batch_size: int,
) -> list[Outcome]:
    from slr_core.evaluation.run import model_of, run_method, spec_of

    spec = spec_of(method, settings, questions.task, questions.loaded, model_of(model))
    run = store.open(spec, versions())
    with progress_bars() as bar:
        answered = bar.add_task(method.name, total=len(questions.examples))
        return run_method(
            method,
            backend,
            questions.task,
            questions.examples,
            settings,
            store=store,
            run=run,
            batch_size=batch_size,
            progress=lambda count: bar.advance(answered, count),
        )


def report(
    results: Annotated[
        Path, typer.Argument(help="Results file of eval, compare, stability, probe or sweep.", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the plots.")] = Path("report"),
) -> None:
    """Write a report from a results file.

    The report is one self-contained HTML page, with a Markdown version and the plots beside it.
    """
    from slr_core.evaluation.report import write
    from slr_core.evaluation.store import Store

    for path in write(Store(results), out):
        print(path)


def baselines(questions: Questions) -> dict[str, float]:
    """Mean score of each shortcut rule that the task knows, on the same questions."""
    scores = [questions.task.baselines(example) for example in questions.examples]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def check_folder(file: Path | None) -> None:
    """Better now than after the work."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: its folder does not exist")


def versions() -> dict[str, str]:
    """What a manifest says of the program: its command line and what it ran on."""
    import torch
    import transformers

    return {
        "command": shlex.join(["slr", *sys.argv[1:]]),
        "slr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _manifest(questions: Questions, model: str | None, settings: Settings) -> dict[str, Any]:
    from slr_core.evaluation.methods import get
    from slr_core.evaluation.run import model_of, spec_of

    spec = spec_of(get("slr"), settings, questions.task, questions.loaded, model_of(model))
    del spec["method"]
    return {"manifest": {**spec, **versions()}}


def _print_levels(levels: dict[int, Summary], overall: Summary, rules: dict[str, float], title: str) -> None:
    from slr_core.evaluation import tables

    _print_table(tables.by_difficulty(levels, overall), title)
    _print_rules(rules)
    changes = "  ".join(map(number, overall.relative_change))
    if changes:
        console.print(f"mean relative change by iteration: {changes}", highlight=False)


def _print_methods(summaries: dict[str, Summary], p: dict[str, float], rules: dict[str, float], title: str) -> None:
    from slr_core.evaluation import tables

    _print_table(tables.by_method(summaries, p), title)
    _print_rules(rules)


def _print_table(table: Figures, title: str) -> None:
    shown = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row, style="bold" if row[0] == "all" else None)
    console.print(shown)


def _print_rules(rules: dict[str, float]) -> None:
    for name, score in rules.items():
        console.print(f"shortcut {name}, which never looks at the model: {score:.3f}", highlight=False)
