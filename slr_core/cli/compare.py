"""``slr compare``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.markup import escape

from slr_core.cli.answering import (
    BatchSize,
    Results,
    Seed,
    Server,
    answer_questions,
    identify,
    manifest,
    open_backend,
    print_baselines,
    print_table,
)
from slr_core.cli.evaluate import MethodName
from slr_core.cli.options import (
    ApiKey,
    AsJson,
    Device,
    Dtype,
    Model,
    Output,
    QuantizationName,
    console,
    finite,
    show_results,
)
from slr_core.cli.questions import Data, Generate, GenerateSeed, GeneratorOptions, Limit, QuestionSet, Split, TaskName
from slr_core.errors import ConfigError, RequestError
from slr_core.suggest import did_you_mean

if TYPE_CHECKING:
    from slr_core.evaluation.methods import Method
    from slr_core.evaluation.outcomes import Outcome


def _complete_methods(incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in ("all", *get_args(MethodName)) if name.startswith(last)]


Weights = Annotated[
    list[str] | None,
    typer.Option(
        help="Checkpoint of a method that needs its own, as method=DIR, such as no_thought=runs/x; repeatable."
    ),
]


def compare(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Methods, separated by commas, or all: {', '.join(get_args(MethodName))}.",
            autocompletion=_complete_methods,
        ),
    ] = "all",
    weights: Weights = None,
    server: Server = None,
    api_key: ApiKey = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    generate: Generate = None,
    generate_seed: GenerateSeed = 0,
    generator_option: GeneratorOptions = None,
    limit: Limit = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Number of samples of self_consistency, best_of_n and slr_vote.")
    ] = 5,
    temperature: Annotated[
        float, typer.Option(min=0.001, callback=finite, help="Sampling temperature of the chains of thought.")
    ] = 0.7,
    beams: Annotated[int, typer.Option(min=1, help="Number of beams of the method beam.")] = 4,
    noise: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Noise in the states of slr_vote, as a share of their RMS.")
    ] = 0.1,
    cot_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a chain of thought, in tokens.")] = 256,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    results: Results = None,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Compare methods and controls on a task.

    All methods answer the same questions; paired tests compare each method with the loop. A method without a figure has
    its reason in the output; the exit code is 1 if no method has one.
    """
    from slr_core.evaluation.methods import METHODS, MethodSettings, get_method
    from slr_core.evaluation.statistics import paired_test, summarize
    from slr_core.evaluation.store import Store
    from slr_core.evaluation.tables import method_table

    chosen = list(METHODS.values()) if methods == "all" else [get_method(name.strip()) for name in methods.split(",")]
    folders = dict[str, str]()
    for name, folder in map(_parse_weights, weights or ()):
        if name in folders:
            raise ConfigError(f"--weights {name}: given twice, {folders[name]} and {folder}")
        folders[name] = folder
    _check_weights(folders)
    questions = QuestionSet(task, data, split, generate, generate_seed, generator_option, limit)
    settings = MethodSettings({}, cot_tokens, samples, temperature, beams, noise, seed)
    store, tested = Store(results), open_backend(model, server, api_key, device, dtype, quantization)
    tested_model = identify(tested, model, dtype, quantization)
    outcomes: dict[str, list[Outcome]] = {}
    missing: dict[str, str] = {}
    for method in chosen:
        reason = _obstacle(method, folders, server)
        if reason is not None:
            missing[method.name] = reason
            continue
        backend, known = tested, tested_model
        if method.weights is not None:
            folder = folders[method.weights]
            backend = open_backend(folder, None, None, device, dtype, quantization)
            known = identify(backend, folder, dtype, quantization)
        try:
            outcomes[method.name] = answer_questions(method, backend, questions, settings, store, known, batch_size)
        except (ConfigError, RequestError) as error:
            missing[method.name] = str(error)
    summaries = {name: summarize(of) for name, of in outcomes.items()}
    loop = outcomes.get("slr")
    tests = {name: paired_test(loop, of) for name, of in outcomes.items() if loop is not None and name != "slr"}
    baselines = questions.baselines()
    store.save_figure("baselines", questions.spec, baselines, {})
    store.save_figure("missing", questions.spec, missing, {})

    def print_text() -> None:
        print_table(method_table(summaries, {name: test.p for name, test in tests.items()}), questions.title)
        print_baselines(baselines)
        for name, reason in missing.items():
            console.print(f"{name}: no figure, {escape(reason)}", highlight=False)

    figures: dict[str, Any] = {name: asdict(summary) for name, summary in summaries.items()}
    for name, test in tests.items():
        figures[name]["paired_with_slr"] = asdict(test)
    record = {"manifest": manifest(questions, tested_model, settings), "baselines": baselines}
    show_results({**record, "figures": figures, "missing": missing}, print_text, as_json, output)
    if not figures:
        raise typer.Exit(1)


def _obstacle(method: Method, folders: dict[str, str], server: str | None) -> str | None:
    """Why the method cannot run; ``None`` if it can."""
    if method.weights is not None and method.weights not in folders:
        return f"it needs weights trained for it: --weights {method.weights}=DIR"
    if server is not None and method.weights is None and not method.remote:
        return "it needs the model in this process, not a server"
    return None


def _parse_weights(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ConfigError(f"--weights {text}: expected method=DIR")
    return name, folder


def _check_weights(folders: dict[str, str]) -> None:
    """Check the names and the checkpoints of ``--weights`` before anything is answered."""
    from slr_core.checkpoint.folder import CONFIG
    from slr_core.checkpoint.hub import find_file
    from slr_core.evaluation.methods import METHODS

    known = sorted({method.weights for method in METHODS.values() if method.weights is not None})
    for name, folder in folders.items():
        if name not in known:
            raise ConfigError(
                f"--weights {name}: no method has weights of that name; there are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
        if find_file(folder, CONFIG) is None:
            raise ConfigError(f"--weights {name}={folder}: expected a checkpoint")
