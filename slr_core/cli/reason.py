"""``slr generate`` and ``slr trace``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from slr_core.cli.options import (
    AsJson,
    Chat,
    CriterionName,
    MaxIterations,
    MaxNewTokens,
    MinIterations,
    Model,
    Patience,
    Prompt,
    Seed,
    Temperature,
    Threshold,
    TopK,
    TopP,
    console,
    load,
    loop_settings,
    number,
    print_json,
)
from slr_core.errors import ConfigError

if TYPE_CHECKING:
    from slr_core.model.reasoner import LatentReasoner
    from slr_core.params import ResolvedLoopParams
    from slr_core.types import Request, Result


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
    chat: Chat = False,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt after a latent loop that stops by itself."""
    from slr_core.params import SamplingParams

    reasoner = load(model)
    loop = loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    result = _run(reasoner, prompt, chat, loop, max_new_tokens=max_new_tokens, sampling=sampling)
    if as_json:
        print_json(result.to_dict())
    else:
        print(result.text)
        print(f"[{_summary_line(result)}]", file=sys.stderr)


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
    chat: Chat = False,
    states: Annotated[
        Path | None, typer.Option(help="write h_0 ... h_t to this .safetensors file, [t + 1, positions, width]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how the state moved, one line an iteration, and what it read as."""
    if states is not None and not states.absolute().parent.is_dir():
        raise ConfigError(f"--states {states}: its folder does not exist")
    reasoner = load(model)
    loop = loop_settings(reasoner, max_iterations, min_iterations, criterion, threshold, patience)
    options = {"max_new_tokens": max_new_tokens, "top_tokens": top_tokens, "include_states": states is not None}
    result = _run(reasoner, prompt, chat, loop, trace=True, **options)
    if states is not None and result.states is not None:
        from safetensors.torch import save_file

        save_file({"states": result.states.contiguous()}, states)
    if as_json:
        print_json(result.to_dict(trace=True))
        return
    console.print(_table(result))
    print(f"\n{result.text}\n[{_summary_line(result)}]")
    print(f"[{_stability_line(result)}]")


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("t", "rel. change", "cosine", "contraction", "entropy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("reads as")
    thinks = any(record.thought is not None for record in result.records)
    if thinks:
        table.add_column("thought")
    for record in result.records:
        numbers = (record.relative_change, record.cosine, record.contraction, record.entropy)
        tokens = "  ".join(f"{escape(token.strip())} {probability:.2f}" for token, probability in record.top_tokens)
        thought = [escape(record.thought or "")] if thinks else []
        table.add_row(str(record.t), *map(number, numbers), record.adapter or "-", tokens, *thought)
    return table


def _run(reasoner: LatentReasoner, prompt: str, chat: bool, loop: ResolvedLoopParams, **options: Any) -> Result:
    from slr_core.generation.prepare import prepare
    from slr_core.generation.reference import generate as run

    text = sys.stdin.read().strip() if prompt == "-" else prompt
    asked = [{"role": "user", "content": text}] if chat else text
    request: Request = prepare(reasoner, asked, loop, **options)
    return run(reasoner, [request])[0]


def _summary_line(result: Result) -> str:
    change = "" if result.final_change is None else f", last change {result.final_change:.3f}"
    return (
        f"{result.iterations} iterations, {result.exit_reason}{change}, "
        f"{result.forward_passes} forward passes, {result.timings.total_s * 1000:.0f} ms"
    )


def _stability_line(result: Result) -> str:
    stability = result.stability
    rate = "" if stability.contraction_rate is None else f", contraction rate {stability.contraction_rate:.3f}"
    return (
        ("converged" if stability.converged else "not converged")
        + rate
        + (", oscillating" if stability.oscillating else "")
    )
