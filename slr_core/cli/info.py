"""``slr info``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from slr_core.cli.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Output,
    QuantizationName,
    console,
    load_model,
    show_results,
)

if TYPE_CHECKING:
    from slr_core.config import LoopConfig
    from slr_core.model.looped import LoopedModel

EXAMPLE_PROMPT_TOKENS = 256
"""Length of the prompt for which cache memory is shown."""


def info(
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: QuantizationName = "none",
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Describe a checkpoint.

    Shows its sizes, the parameters that the loop adds, its settings and the cache memory of a request.
    """
    reasoner = load_model(model, device, dtype, quantization)
    show_results(description(reasoner), lambda: print_description(reasoner), as_json, output)


def description(reasoner: LoopedModel) -> dict[str, Any]:
    """Sizes and settings of a checkpoint as JSON-ready values."""
    from slr_core.checkpoint.info import describe_model

    sizes = describe_model(reasoner)
    added = {"added_parameters": sizes.added_parameters, "added_share": sizes.added_share}
    return {**asdict(sizes), **added, "config": reasoner.config.model_dump(mode="json")}


def print_description(reasoner: LoopedModel) -> None:
    """Print sizes and settings of a checkpoint, one row each."""
    from slr_core.checkpoint.info import describe_model
    from slr_core.model.base_support import attention_window

    sizes, config = describe_model(reasoner), reasoner.config
    loop, text = config.loop, config.text
    window = attention_window(reasoner.base.config)
    per_position, latent = sizes.cache_bytes_per_position, loop.decoder.latent_decoder
    example = sizes.cache_bytes(EXAMPLE_PROMPT_TOKENS, text.max_new_tokens)
    unlooped = per_position * (EXAMPLE_PROMPT_TOKENS + text.max_new_tokens)
    rows = {
        "base": f"{sizes.architecture}, {sizes.base_parameters:,} parameters"
        + (f", {config.base} {config.base_revision}" if config.base_sha256 is not None else ""),
        "weights": f"{str(reasoner.base.dtype).removeprefix('torch.')} on {reasoner.device}",
        "loop adds": f"{sizes.added_parameters:,} parameters, {sizes.added_share:.1%} of the base",
        "workspace": loop.workspace + (f" of {loop.block_size}" if loop.workspace == "block" else ""),
        "iterations": ("0 until the loop is trained; then " if sizes.untrained else "")
        + f"{loop.min_iterations} to {loop.max_iterations}",
        "stops when": "all iterations have run (fixed)"
        if loop.convergence.criterion == "fixed"
        else f"{_criterion(reasoner)} < {loop.convergence.effective_threshold:g}"
        f" for {loop.convergence.patience} iteration(s)",
        "projection": loop.projection.kind,
        "timestep": f"{loop.timestep.kind}, {loop.timestep.combine}"
        + (", with the noise level" if loop.timestep.noise_level else ""),
        "loop LoRA": _adapters(loop, sizes.untrained),
        "residual": f"{loop.residual.source}, {loop.residual.mix}" + (", RMS norm" if loop.residual.norm else ""),
        "decoder": loop.decoder.answers + ("" if latent is None else f" (latent decoder: {latent.layers} layers)"),
        "positions": f"{sizes.max_positions:,} (prompt, loop and answer together)"
        + ("" if window is None else f", the base's sliding window is {window:,}"),
        "vocabulary": f"{sizes.vocabulary:,} tokens",
        "cache": f"{_size(per_position)} per position; {_size(example)} for a prompt of {EXAMPLE_PROMPT_TOKENS} tokens "
        f"and an answer of {text.max_new_tokens}, of which the loop takes {_size(example - unlooped)}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _criterion(reasoner: LoopedModel) -> str:
    exit = reasoner.config.loop.convergence
    if exit.criterion != "end_token" or exit.end_token_id is None:
        return exit.criterion
    return f"{exit.criterion} `{reasoner.tokenizer.decode([exit.end_token_id])}`"


def _adapters(loop: LoopConfig, untrained: bool) -> str:
    if loop.lora.kind == "none":
        return "none"
    ranks = loop.lora.rank if isinstance(loop.lora.rank, tuple) else (loop.lora.rank,)
    state = "untrained" if untrained else f"trained for {loop.trained_iterations} iterations, then {loop.lora.past_end}"
    return f"{loop.lora.kind}, rank {' '.join(map(str, ranks))}, {state}"


def _size(count: int) -> str:
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.1f} {units[0]}"
