"""A server in its own process, for benchmarks."""

from __future__ import annotations

import subprocess
import sys


def start_server(**flags: object) -> tuple[subprocess.Popen[str], str]:
    """Start ``slr-serve`` on a free port, with one engine thread and no access log: its process and URL.

    Args:
        flags: further flags, with underscores for hyphens.
    """
    given = {"port": 0, "threads": 1, "log_level": "warning", **flags}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen([sys.executable, "-m", "slr_server.cli", *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]
