"""``slr init`` and ``slr info``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slr_core.cli.options import AsJson, Model, console, load, print_json

if TYPE_CHECKING:
    from slr_core.model.reasoner import LatentReasoner

EXAMPLE_PROMPT = 256
"""Tokens of the prompt for which cache memory is told."""


def init(
    base: Annotated[str, typer.Argument(help="a causal language model: a local folder, a hub id or a .gguf file")],
    out: Annotated[Path, typer.Option(help="folder to write; it must be new or empty")],
    config: Annotated[
        Path | None, typer.Option(help="loop settings in YAML, such as the one line `workspace: block`", dir_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the new weights")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make an untrained latent reasoner of a base model: a checkpoint folder.

    Its adapters start without effect and its other parts near it; `slr info` shows it again.
    """
    from slr_core.checkpoint.init import initialize

    _print(initialize(base, out, config, seed=seed), as_json)


def info(model: Model = None, as_json: AsJson = False) -> None:
    """Describe a checkpoint: sizes, the parameters that the loop adds, its settings, its cache memory."""
    _print(load(model), as_json)


def _print(reasoner: LatentReasoner, as_json: bool) -> None:
    from slr_core.checkpoint.info import describe

    facts, loop, text = describe(reasoner), reasoner.config.loop, reasoner.config.text
    if as_json:
        added = {"added_parameters": facts.added_parameters, "added_share": facts.added_share}
        print_json({**asdict(facts), **added, "config": reasoner.config.model_dump(mode="json")})
        return
    position, latent = facts.cache_bytes_per_position, loop.decoder.latent_decoder
    rows = {
        "base": f"{facts.architecture}, {facts.base_parameters:,} parameters",
        "loop adds": f"{facts.added_parameters:,} parameters, {facts.added_share:.1%} of the base",
        "workspace": loop.workspace + (f" of {loop.block_size}" if loop.workspace == "block" else ""),
        "iterations": f"{loop.min_iterations} to {loop.max_iterations}, {loop.trained_iterations} trained, "
        f"past them: {loop.lora.past_end}",
        "stops when": f"{loop.convergence.criterion} < {loop.convergence.effective_threshold:g}"
        f" for {loop.convergence.patience} iteration(s)",
        "projection": loop.projection.kind,
        "timestep": f"{loop.timestep.kind}, {loop.timestep.combine}"
        + (", with the noise level" if loop.timestep.noise_level else ""),
        "loop LoRA": loop.lora.kind + ("" if loop.lora.kind == "none" else f", rank {_ranks(loop.lora.rank)}"),
        "residual": f"{loop.residual.source}, {loop.residual.mix}" + (", RMS norm" if loop.residual.norm else ""),
        "answers by": loop.decoder.answers + ("" if latent is None else f" (latent decoder: {latent.layers} layers)"),
        "positions": f"{facts.max_positions:,} (prompt, loop and answer together)",
        "vocabulary": f"{facts.vocabulary:,} tokens",
        "cache": f"{_size(position)} a position; a prompt of {EXAMPLE_PROMPT} tokens and an answer of "
        f"{text.max_new_tokens} take {_size(facts.cache_bytes(EXAMPLE_PROMPT, text.max_new_tokens))}, "
        f"the loop's part {_size(facts.loop_positions * position)}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _ranks(rank: int | tuple[int, ...]) -> str:
    return str(rank) if isinstance(rank, int) else " ".join(map(str, rank))


def _size(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
