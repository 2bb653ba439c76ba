"""``slr eval``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slr_core.cli.answering import (
    BatchSize,
    Results,
    Seed,
    Server,
    answer_questions,
    identify,
    manifest,
    open_backend,
    open_ray_engines,
    print_baselines,
    print_table,
)
from slr_core.cli.options import (
    ApiKey,
    AsJson,
    CriterionName,
    Device,
    Dtype,
    MaxIterations,
    MinIterations,
    Model,
    Output,
    Patience,
    QuantizationName,
    Threshold,
    console,
    number,
    show_results,
)
from slr_core.cli.questions import Data, Generate, GenerateSeed, GeneratorOptions, Limit, QuestionSet, Split, TaskName
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.evaluation.backends import Backend
    from slr_core.evaluation.run import BatchRunner
    from slr_core.evaluation.statistics import Summary

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
    "zeroed_thoughts",
    "paused_thoughts",
    "foreign_thoughts",
]


def evaluate(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    method: Annotated[MethodName, typer.Option(help="Method that answers the questions.")] = "slr",
    server: Server = None,
    api_key: ApiKey = None,
    ray_engines: Annotated[
        int | None, typer.Option("--ray", min=1, help="Answer on a Ray cluster, with this many engines.")
    ] = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    generator_option: GeneratorOptions = None,
    limit: Limit = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Score a model on a task.

    Prints accuracy with confidence intervals, and the scores of the task's shortcut rules on the same questions.
    """
    from slr_core.evaluation.backends import Local
    from slr_core.evaluation.methods import MethodSettings, get_method
    from slr_core.evaluation.statistics import summarize, summarize_by_difficulty
    from slr_core.evaluation.store import Store

    questions = QuestionSet(task, data, split, generate, generate_seed, generator_option, limit)
    loop = {
        "max_iterations": max_iterations,
        "min_iterations": min_iterations,
        "criterion": criterion,
        "threshold": threshold,
        "patience": patience,
    }
    settings = MethodSettings({name: value for name, value in loop.items() if value is not None}, seed=seed)
    store = Store(results)  # before the model: it is quicker to check
    if ray_engines is None:
        backend: Backend | BatchRunner = open_backend(model, server, api_key, device, dtype, quantization)
    elif server is None:
        backend = open_ray_engines(ray_engines, model, device, dtype, quantization)
    else:
        raise ConfigError("--ray and --server exclude each other")
    name = identify(backend, model, dtype, quantization)
    outcomes = answer_questions(get_method(method), backend, questions, settings, store, name, batch_size)
    levels, overall, baselines = summarize_by_difficulty(outcomes), summarize(outcomes), questions.baselines()
    store.save_figure("baselines", questions.spec, baselines, {})

    def print_text() -> None:
        _print(levels, overall, f"{questions.task.name}: {questions.source}")
        print_baselines(baselines)
        if isinstance(backend, Local) and (rows := backend.rows_per_step) is not None:
            console.print(f"mean rows per step: {rows:.1f} of {backend.engine.slots}", highlight=False)

    record = {
        "method": method,
        "manifest": manifest(questions, name, settings),
        "overall": asdict(overall),
        "by_difficulty": {level: asdict(summary) for level, summary in levels.items()},
        "baselines": baselines,
    }
    show_results(record, print_text, as_json, output)


def _print(levels: dict[int, Summary], overall: Summary, title: str) -> None:
    from slr_core.evaluation.tables import difficulty_table

    print_table(difficulty_table(levels, overall), title)
    changes = "  ".join(map(number, overall.relative_change))
    if changes:
        console.print(f"mean relative change by iteration: {changes}", highlight=False)
