"""``slr trace``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from slr_core.cli.generate import UseTemplate, read_prompt, run_prompt, summary
from slr_core.cli.options import (
    AsJson,
    CriterionName,
    Device,
    Dtype,
    MaxIterations,
    MaxNewTokens,
    MinIterations,
    Model,
    Output,
    Patience,
    Prompt,
    QuantizationName,
    Threshold,
    console,
    load_model,
    number,
    show_results,
)
from slr_core.errors import ConfigError
from slr_core.params import LoopParams

if TYPE_CHECKING:
    from slr_core.types import Result, Stability


def trace(
    prompt: Prompt,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    max_iterations: MaxIterations = None,
    min_iterations: MinIterations = None,
    criterion: CriterionName = None,
    threshold: Threshold = None,
    patience: Patience = None,
    max_new_tokens: MaxNewTokens = None,
    top_tokens: Annotated[
        int, typer.Option(min=0, max=50, help="Number of likeliest tokens to show per iteration.")
    ] = 4,
    chat: UseTemplate = False,
    states: Annotated[
        Path | None,
        typer.Option(
            help="Write the states h_0 ... h_t to this .safetensors file, shape [t + 1, positions, width].",
            dir_okay=False,
        ),
    ] = None,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Show every iteration of a loop.

    One line per iteration: how far the state moved, and the tokens that the LM head reads from it (logit lens).
    """
    if states is not None and not states.absolute().parent.is_dir():
        raise ConfigError(f"--states {states}: the folder does not exist")
    reasoner = load_model(model, device, dtype, quantization)
    loop = LoopParams(max_iterations, min_iterations, criterion, threshold, patience)
    result = run_prompt(
        reasoner,
        read_prompt(prompt, chat, reasoner),
        loop,
        max_new_tokens=max_new_tokens,
        trace=True,
        top_tokens=top_tokens,
        include_states=states is not None,
    )
    if states is not None and result.states is not None:
        from safetensors.torch import save_file

        save_file({"states": result.states.contiguous()}, states)

    def print_text() -> None:
        console.print(_table(result))
        print(f"\n{result.text}\n[{summary(result)}]\n[{_stability(result.stability)}]")

    show_results(result.to_dict(trace=True), print_text, as_json, output)


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("t", "rel. change", "cosine", "contraction", "entropy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("logit lens")
    has_thoughts = any(record.thought is not None for record in result.records)
    if has_thoughts:
        table.add_column("thought")
    for record in result.records:
        numbers = (record.relative_change, record.cosine, record.contraction, record.entropy)
        tokens = "  ".join(f"{escape(token.strip())} {probability:.2f}" for token, probability in record.top_tokens)
        thought = [escape(record.thought or "")] if has_thoughts else []
        table.add_row(str(record.t), *map(number, numbers), record.adapter or "-", tokens, *thought)
    return table


def _stability(stability: Stability) -> str:
    rate = "" if stability.contraction_rate is None else f", contraction rate {stability.contraction_rate:.3f}"
    return (
        ("converged" if stability.converged else "not converged")
        + rate
        + (", oscillating" if stability.oscillating else "")
    )
