"""``slr serve``, and the command ``slr-serve``. The server itself is the package ``slr_server``."""

from __future__ import annotations

import sys

import typer

from slr_core._install import missing_extra
from slr_core.errors import ConfigError


def serve(context: typer.Context) -> None:
    """Serve a checkpoint over HTTP.

    This is the command `slr-serve`, with the same options.
    """
    run_server(context.args)


def run_server(arguments: list[str]) -> None:
    """Run the server with the given command-line arguments.

    Raises:
        ConfigError: the packages of the extra `serve` are not installed.
        SystemExit: an argument is wrong, or the server failed.
    """
    try:
        from slr_server.cli import main as run
    except ImportError as error:
        raise missing_extra("the server", "serve", error) from error
    run(arguments)


def main() -> None:
    """Run ``slr-serve``."""
    try:
        run_server(sys.argv[1:])
    except ConfigError as error:
        print(f"slr-serve: error: {error}", file=sys.stderr)
        sys.exit(1)
