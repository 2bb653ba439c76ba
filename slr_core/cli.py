"""The command ``slr``: generate, trace, info, train, eval.

torch and transformers are imported inside the commands: ``slr --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from slr_core._version import __version__
from slr_core.errors import ConfigError, DataError, SLRError

if TYPE_CHECKING:
    from slr_core.evaluation.evaluate import Evaluation, Summary
    from slr_core.generation import Request, Result
    from slr_core.loop.convergence import LoopSettings
    from slr_core.model import LatentReasoner
    from slr_core.tasks.base import Example

app = typer.Typer(
    help="Stable Latent Reasoning: language models that think in their hidden states.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Redirected output is for files and pipes: no reason to wrap it at 80 columns.
console = Console() if sys.stdout.isatty() else Console(width=140)

Model = Annotated[str | None, typer.Option(help="checkpoint folder or hub id  [default: the bundled prosqa]")]
Prompt = Annotated[str, typer.Argument(help="the question; `-` reads it from standard input")]
MaxIterations = Annotated[int | None, typer.Option(min=0, max=256, help="most iterations; 0 is the plain base model")]
MinIterations = Annotated[int | None, typer.Option(min=0, max=256, help="fewest iterations")]
CriterionName = Annotated[str | None, typer.Option("--criterion", help="what is compared to the threshold")]
Threshold = Annotated[float | None, typer.Option(min=0.0, help="stop below this")]
Patience = Annotated[int | None, typer.Option(min=1, help="consecutive iterations below the threshold")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy")]
TopK = Annotated[int, typer.Option(min=0, help="sample from the k likeliest tokens; 0: all")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens that make up this mass")]
Seed = Annotated[int | None, typer.Option(help="of the sampling")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Entry point: errors of ours are one line on standard error and exit code 1."""
    try:
        app()
    except SLRError as error:
        print(f"slr: {error}", file=sys.stderr)
        sys.exit(1)


def _version(value: bool) -> None:
    if value:
        print(f"slr {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    prompt: Prompt,
    model: Model = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt after a latent loop that stops by itself."""
    from slr_core.sampling import SamplingSettings

    reasoner = _load(model)
    loop = _loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    sampling = SamplingSettings(temperature, top_k, top_p, seed)
    result = _run(reasoner, prompt, loop, max_new_tokens=max_new_tokens, sampling=sampling)
    if as_json:
        _print_json(_result_json(result))
    else:
        print(result.text)
        print(f"[{_summary_line(result)}]", file=sys.stderr)


@app.command()
def trace(
    prompt: Prompt,
    model: Model = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    max_new_tokens: MaxNewTokens = None,
    top_tokens: Annotated[int, typer.Option(min=0, max=50, help="likeliest tokens to show per iteration")] = 4,
    as_json: AsJson = False,
) -> None:
    """Show how the state moved, one line an iteration, and what it read as."""
    reasoner = _load(model)
    loop = _loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    result = _run(reasoner, prompt, loop, max_new_tokens=max_new_tokens, trace=True, top_tokens=top_tokens)
    if as_json:
        from dataclasses import asdict

        records = [
            asdict(record) | {"top_tokens": [{"token": token, "prob": prob} for token, prob in record.top_tokens]}
            for record in result.records
        ]
        _print_json({**_result_json(result), "trace": records, "stability": asdict(result.stability)})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("t", "rel. change", "cosine", "contraction", "entropy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("reads as")
    for record in result.records:
        numbers = (record.relative_change, record.cosine, record.contraction, record.entropy)
        tokens = "  ".join(f"{escape(token.strip())} {probability:.2f}" for token, probability in record.top_tokens)
        table.add_row(str(record.t), *map(_number, numbers), record.adapter or "-", tokens)
    console.print(table)
    print(f"\n{result.text}\n[{_summary_line(result)}]")


@app.command()
def info(model: Model = None, as_json: AsJson = False) -> None:
    """Describe a checkpoint: sizes, the parameters that the loop adds, its settings."""
    from slr_core.checkpoint import describe

    reasoner = _load(model)
    facts = describe(reasoner)
    if as_json:
        _print_json({**facts, "config": reasoner.config.model_dump(mode="json")})
        return
    loop = reasoner.config.loop
    added = facts["adapter_parameters"] + facts["module_parameters"]
    rows = {
        "base": f"{facts['architecture']}, {facts['base_parameters']:,} parameters",
        "loop adds": f"{added:,} parameters, {facts['added_share']:.1%} of the base",
        "workspace": loop.workspace,
        "iterations": f"{loop.min_iterations} to {loop.max_iterations}, {loop.trained_iterations} trained",
        "stops when": f"{loop.convergence.criterion} < {loop.convergence.effective_threshold:g}"
        f" for {loop.convergence.patience} iteration(s)",
        "timestep": f"{loop.timestep.kind}, {loop.timestep.combine}",
        "loop LoRA": f"{loop.lora.kind}, rank {loop.lora.rank}",
        "residual": f"{loop.residual.source}, {loop.residual.mix}",
        "positions": f"{facts['max_positions']:,} (prompt, thoughts and answer together)",
        "vocabulary": f"{facts['vocabulary']:,} tokens",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a recipe, such as configs/prosqa.yaml", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="change a setting of the recipe: dotted.name=value; repeatable")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of output_dir")] = False,
) -> None:
    """Train a recipe and write its checkpoint folder."""
    try:
        from slr_core.training.trainer import train as run
    except ImportError as error:
        raise ConfigError(f"training needs the extra `train`: pip install 'slr[train]' ({error})") from error
    from slr_core.training.config import TrainConfig

    print(run(TrainConfig.from_yaml(config, tuple(overrides or ())), resume=resume))


@app.command(name="eval")
def evaluate(
    model: Model = None,
    task: Annotated[str, typer.Option(help="what to grade by: prosqa")] = "prosqa",
    data: Annotated[Path | None, typer.Option(help="a .jsonl or .jsonl.gz file of questions")] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="generate this many questions instead")] = None,
    generate_seed: Annotated[int, typer.Option(help="of the generated questions")] = 0,
    nodes: Annotated[int, typer.Option(help="generated: most nodes of a graph")] = 10,
    min_hops: Annotated[int, typer.Option(help="generated: shortest path, at least")] = 2,
    max_hops: Annotated[int, typer.Option(help="generated: shortest path, at most")] = 4,
    balanced: Annotated[
        bool, typer.Option("--balanced/--official", help="generated: without, or with, the depth shortcut")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="first questions of the file only")] = None,
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions per batch")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Score a model, with confidence intervals and the task's shortcut rules beside it."""
    from slr_core.evaluation.evaluate import evaluate as run
    from slr_core.tasks.base import read_jsonl
    from slr_core.tasks.prosqa import GraphSpec, ProsQA
    from slr_core.tasks.prosqa import generate as make

    if task != ProsQA.name:
        raise ConfigError(f"--task must be prosqa, got {task}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: its folder does not exist")
    if (data is None) == (generate is None):
        raise ConfigError("give exactly one of --data FILE and --generate N")
    examples: list[Example]
    if data is not None:
        examples = read_jsonl(data)[:limit]
        if not examples:
            raise DataError(f"{data}: no questions in it")
        source = data.parent.name + "/" + data.name
    else:
        spec = GraphSpec(nodes, min_hops, max_hops, balanced)
        examples = list(islice(make(spec, generate_seed), generate))
        source = (
            f"generated, seed {generate_seed}, {'balanced' if balanced else 'official'} form, "
            f"at most {nodes} nodes, {min_hops} to {max_hops} hops"
        )
    reasoner = _load(model)
    settings = _loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        answered = bar.add_task("answering", total=len(examples))
        report = run(
            reasoner,
            ProsQA(),
            examples,
            settings=settings,
            batch_size=batch_size,
            progress=lambda count: bar.advance(answered, count),
        )
    _print_evaluation(report, f"{ProsQA.name}: {source}")
    if json_file is not None:
        record = {"task": task, "source": source, "model": model or "prosqa (bundled)", "loop": vars(settings)}
        json_file.write_text(json.dumps(record | report.to_json(), indent=2) + "\n", encoding="utf-8")


def _print_evaluation(report: Evaluation, title: str) -> None:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("steps", "questions", "accuracy", "95 % interval", "iterations", "converged", "passes"):
        table.add_column(column, justify="right", no_wrap=True)
    for level, summary in report.by_difficulty.items():
        table.add_row(str(level), *_cells(summary))
    table.add_section()
    table.add_row("all", *_cells(report.overall), style="bold")
    console.print(table)
    for name, score in report.baselines.items():
        console.print(f"shortcut {name} : {score:.3f}")
    changes = "  ".join(map(_number, report.overall.relative_change))
    if changes:
        console.print(f"mean relative change by iteration: {changes}")
    console.print(f"{report.seconds:.1f} s")


def _cells(summary: Summary) -> list[str]:
    low, high = summary.interval
    return [
        str(summary.questions),
        f"{summary.accuracy:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{summary.iterations:.2f}",
        f"{summary.converged:.1%}",
        f"{summary.forward_passes:.2f}",
    ]


def _load(model: str | None) -> LatentReasoner:
    from transformers.utils import logging

    from slr_core.model import LatentReasoner

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return LatentReasoner.from_pretrained(model)


def _loop_settings(
    reasoner: LatentReasoner,
    max_iterations: int | None,
    min_iterations: int | None,
    criterion: str | None,
    threshold: float | None,
    patience: int | None,
) -> LoopSettings:
    from slr_core.loop.convergence import LoopSettings

    return LoopSettings.resolve(
        reasoner.config.loop,
        max_iterations=max_iterations,
        min_iterations=min_iterations,
        criterion=criterion,  # type: ignore[arg-type]  # checked there
        threshold=threshold,
        patience=patience,
    )


def _run(reasoner: LatentReasoner, prompt: str, loop: LoopSettings, **options: Any) -> Result:
    from slr_core.generation import generate as run
    from slr_core.generation import prepare

    text = sys.stdin.read().strip() if prompt == "-" else prompt
    request: Request = prepare(reasoner, text, loop, **options)
    return run(reasoner, [request])[0]


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "iterations": result.iterations,
        "exit_reason": result.exit_reason,
        "final_change": result.final_change,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
            "forward_passes": result.forward_passes,
        },
        "timings": vars(result.timings),
    }


def _summary_line(result: Result) -> str:
    change = "" if result.final_change is None else f", last change {result.final_change:.3f}"
    return (
        f"{result.iterations} iterations, {result.exit_reason}{change}, "
        f"{result.forward_passes} forward passes, {result.timings.total_s * 1000:.0f} ms"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
