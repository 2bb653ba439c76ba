"""The command ``slr``: generate, trace, init, info, train, and what evaluates.

torch and transformers are imported inside the commands: ``slr --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slr_core._version import __version__
from slr_core.cli import evaluate, load, models, probe, reason, stability, sweep, train
from slr_core.errors import SLRError

app = typer.Typer(
    help="Stable Latent Reasoning: language models that think in their hidden states.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(reason.generate)
app.command()(reason.trace)
app.command()(models.init)
app.command()(models.info)
app.command()(train.train)
app.command(name="eval")(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(stability.stability)
app.command()(probe.probe)
app.command()(sweep.sweep)
app.command()(evaluate.report)
app.command()(load.load)


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
