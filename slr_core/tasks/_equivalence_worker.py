"""What runs in the child process of :mod:`slr_core.tasks.equivalence`."""

from __future__ import annotations

import logging
import os
import signal

_MEMORY_GIB = 4


def set_up_worker() -> None:
    """Load math-verify, silence output, limit the memory, and let SIGTERM end the process at once."""
    from math_verify import grader  # type: ignore[import-untyped]

    from slr_core.tasks.numeric import compare_relatively

    grader.sympy_numeric_eq = compare_relatively(grader.sympy_numeric_eq)
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for a long operation on integers
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GIB << 30, _MEMORY_GIB << 30))
    except (ImportError, OSError, ValueError):
        pass  # not every system has this limit


def compare(gold: str, answer: str) -> bool:
    """Whether math-verify calls the two equal. False where it fails."""
    from math_verify import parse, verify

    try:
        # No time limits here: those of math-verify are signals. The parent process has one.
        return bool(
            verify(
                parse(f"${gold}$", parsing_timeout=None),
                parse(f"${answer}$", parsing_timeout=None),
                timeout_seconds=None,
            )
        )
    except (Exception, RecursionError, MemoryError):
        return False
