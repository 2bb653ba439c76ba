"""The command ``slr``.

Commands import torch and transformers when they run, so that ``slr --help`` and completion answer at once.
"""

from __future__ import annotations

import sys
from functools import partial
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
_command = partial(app.command, cls=Command)
_command()(generate.generate)
_command()(chat.chat)
_command()(trace.trace)
_command()(init.init)
_command()(average.average)
_command(name="import")(import_.import_)
_command()(export.export)
_command()(info.info)
# Every argument, --help included, goes to the server.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
_command()(train.train)
_command(name="eval")(evaluate.evaluate)
_command()(compare.compare)
_command()(stability.stability)
_command()(probe.probe)
_command()(sweep.sweep)
_command()(report.report)
_command()(load.load)


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
