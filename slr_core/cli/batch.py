"""``slr generate --input``: a file of requests."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slr_core._install import missing_extra
from slr_core.cli.options import hide_loading_bars, progress_bars
from slr_core.errors import ConfigError

Input = Annotated[
    Path | None,
    typer.Option(
        "--input",
        help="Answer a file instead of a prompt. Each line is a body of /generate (with an optional id), or a request "
        "of OpenAI's batch format; --output gets one line for each, in order. A repeated command continues.",
        dir_okay=False,
    ),
]
RayEngines = Annotated[
    int | None,
    typer.Option("--ray", min=1, help="With --input: answer on a Ray cluster, with this many engines."),
]
OF_FILES = frozenset({"source", "output", "ray_engines", "model", "device", "dtype", "quantization"})
"""Parameters of ``slr generate`` that apply to a file; the others are in its lines."""


def run_file(
    context: typer.Context, source: Path, output: Path | None, ray_engines: int | None, given: dict[str, Any]
) -> None:
    """Answer a file.

    Args:
        context: of the command.
        source: the input.
        output: file of the answers.
        ray_engines: number of engines on a Ray cluster; ``None``: one, in this process.
        given: settings of the model.

    Raises:
        ConfigError: an option does not apply to a file, or an extra is missing.
        DataError: a file cannot be used.
    """
    if output is None:
        raise ConfigError("--input needs --output FILE")
    for name in context.params:
        chosen = context.get_parameter_source(name)
        if name not in OF_FILES and chosen is not None and chosen.name != "DEFAULT":
            raise ConfigError(f"{name}: with --input, parameters of a request are in its line")
    hide_loading_bars()
    try:
        from slr_server.batch import batch_settings, run_batch
    except ImportError as error:
        raise missing_extra("--input", "serve", error) from error
    with progress_bars() as bar:
        task = bar.add_task("lines", total=None)

        def show(count: int) -> None:
            bar.update(task, completed=count)

        if ray_engines is None:
            answered = asyncio.run(run_batch(source, output, batch_settings(**given), show))
        else:
            try:
                from slr_server.ray_batch import run_ray_batch
            except ImportError as error:
                raise missing_extra("--ray", "ray", error) from error
            answered = run_ray_batch(source, output, given, ray_engines, show)
    print(f"answered {answered} lines", file=sys.stderr)
