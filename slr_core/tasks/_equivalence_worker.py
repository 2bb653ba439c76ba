"""Compares mathematical expressions with math-verify, in a process of its own: see ``equivalence``.

Reads ``{"gold": str, "answer": str}`` a line, writes ``{"equal": bool}`` a line. It is run as a script and
imports nothing of this project.
"""

from __future__ import annotations

import json
import logging
import sys


def _limit_memory(gibibytes: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30))
    except (ImportError, OSError, ValueError):
        pass  # not every system can


def main() -> None:
    """Answer lines until the input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else may write there
    _limit_memory(4)
    from math_verify import parse, verify  # type: ignore[import-untyped]

    logging.disable(logging.CRITICAL)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            # No timeouts here: those of math-verify are signals. The process that asks has one, and ends this one.
            gold, answer = (parse(f"${request[k]}$", parsing_timeout=None) for k in ("gold", "answer"))
            equal = bool(verify(gold, answer, timeout_seconds=None))
        except (Exception, RecursionError, MemoryError):
            equal = False
        print(json.dumps({"equal": equal}), file=replies, flush=True)


if __name__ == "__main__":
    main()
