"""What the commands that run methods share: their options, running a method, and printing its figures."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from slr_core._install import missing_extra
from slr_core._version import __version__
from slr_core.cli.options import API_KEY_FLAG, console, load_model, progress_bars
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.cli.questions import QuestionSet
    from slr_core.evaluation.backends import Backend
    from slr_core.evaluation.methods import Method, MethodSettings
    from slr_core.evaluation.outcomes import Outcome
    from slr_core.evaluation.run import BatchRunner
    from slr_core.evaluation.store import Store
    from slr_core.evaluation.tables import FigureTable

Server = Annotated[str | None, typer.Option(help="Evaluate a running server at this URL instead of loading --model.")]
Results = Annotated[
    Path | None,
    typer.Option(help="File (.jsonl) that stores every answer; a repeated command continues from it."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random choices of the methods.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of questions per batch.")]


def open_backend(
    model: str | None, server: str | None, api_key: str | None, device: str, dtype: str, quantization: str
) -> Backend:
    """The server, if one is named, or else the model, loaded into this process.

    Raises:
        ConfigError: both are named.
    """
    if model is not None and server is not None:
        raise ConfigError("--model and --server exclude each other: a server answers with its own model")
    from slr_core.evaluation.backends import Local, Remote

    return Local(load_model(model, device, dtype, quantization)) if server is None else Remote(server, api_key=api_key)


def identify(backend: Backend | BatchRunner, model: str | None, dtype: str, quantization: str) -> dict[str, Any]:
    """What tells the backend's model from others; a server is asked.

    Raises:
        RequestError: the server refuses to tell.
        EngineError: it cannot be reached.
    """
    from slr_core.evaluation.backends import Remote
    from slr_core.evaluation.run import identify_model

    return backend.identify() if isinstance(backend, Remote) else identify_model(model, dtype, quantization)


def open_ray_engines(engines: int, model: str | None, device: str, dtype: str, quantization: str) -> BatchRunner:
    """Engines on a Ray cluster.

    Raises:
        ConfigError: the extra is missing.
    """
    try:
        from slr_core.evaluation.on_ray import RayEngines
    except ImportError as error:
        raise missing_extra("--ray", "ray", error) from error
    return RayEngines(engines, model, device=device, dtype=dtype, quantization=quantization)


def answer_questions(
    method: Method,
    backend: Backend | BatchRunner,
    questions: QuestionSet,
    settings: MethodSettings,
    store: Store,
    model: dict[str, Any],
    batch_size: int,
) -> list[Outcome]:
    """Run a method on all questions, with a progress bar; ``store`` supplies what was answered before.

    ``model`` is what :func:`identify` says of the model.
    """
    from slr_core.evaluation.run import run_method, run_spec

    spec = run_spec(method, settings, questions.task, questions.loaded, model)
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
            warm_up=True,
            progress=lambda count: bar.advance(answered, count),
        )


def versions() -> dict[str, str]:
    """The command line, and the versions that it ran with, for a manifest."""
    import torch
    import transformers

    return {
        "command": shlex.join(["slr", *_without_key(sys.argv[1:])]),
        "slr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _without_key(arguments: list[str]) -> list[str]:
    """Arguments that may be stored: without the value of ``--api-key``."""
    shown = [f"{API_KEY_FLAG}=***" if word.startswith(f"{API_KEY_FLAG}=") else word for word in arguments]
    return ["***" if before == API_KEY_FLAG else word for before, word in zip(["", *shown], shown, strict=False)]


def manifest(questions: QuestionSet, model: dict[str, Any], settings: MethodSettings) -> dict[str, Any]:
    """How the figures of a command were made."""
    from slr_core.evaluation.methods import get_method
    from slr_core.evaluation.run import run_spec

    spec = run_spec(get_method("slr"), settings, questions.task, questions.loaded, model)
    del spec["method"]
    return {**spec, **versions()}


def print_table(table: FigureTable, title: str) -> None:
    """Print a table of figures; the row of all questions is bold."""
    shown = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row, style="bold" if row[0] == "all" else None)
    console.print(shown)


def print_baselines(scores: dict[str, float]) -> None:
    """Print the scores of the task's shortcut rules, one line each."""
    for name, score in scores.items():
        console.print(f"shortcut rule {name} (needs no reasoning): {score:.3f}", highlight=False)
