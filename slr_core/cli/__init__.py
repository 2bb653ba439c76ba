"""The command ``slr``.

Commands import torch and transformers when they run, so that ``slr --help`` and completion answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slr_core._version import __version__
from slr_core.cli import (
    average,
    chat,
    compare,
    evaluate,
    export,
    generate,
    import_,
    info,
    init,
    load,
    probe,
    report,
    serve,
    stability,
    sweep,
    trace,
    train,
)
from slr_core.cli.options import Command
from slr_core.errors import SLRError

app = typer.Typer(
    help="Stable Latent Reasoning: run, train and evaluate language models that reason in their hidden states.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take [brackets] in help texts for markup and drop them
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(generate.generate)
app.command(cls=Command)(chat.chat)
app.command(cls=Command)(trace.trace)
app.command(cls=Command)(init.init)
app.command(cls=Command)(average.average)
app.command(name="import", cls=Command)(import_.import_)
app.command(cls=Command)(export.export)
app.command(cls=Command)(info.info)
# Every argument, --help included, goes to the server.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
app.command(cls=Command)(train.train)
app.command(name="eval", cls=Command)(evaluate.evaluate)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(stability.stability)
app.command(cls=Command)(probe.probe)
app.command(cls=Command)(sweep.sweep)
app.command(cls=Command)(report.report)
app.command(cls=Command)(load.load)


def main() -> None:
    """Run the command line. An :class:`SLRError` is printed as one line on standard error, with exit code 1."""
    try:
        app()
    except SLRError as error:
        print(f"slr: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(value: bool) -> None:
    if value:
        print(f"slr {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
