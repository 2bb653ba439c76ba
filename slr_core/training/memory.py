"""Memory that a training step frees stays with the process for the next step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_NEVER = 1 << 30


def keep_freed_memory() -> None:
    """Tell GNU's C library not to return freed memory to the operating system; elsewhere nothing happens.

    By default it returns blocks above 32 MiB, and the end of the heap.

    Each step would get them again as new pages, which the kernel fills with zeros first: 5 % of the time of a step on
    one core (``python -m benchmarks.training --base DIR``).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
        library.mallopt(_MMAP_THRESHOLD, _NEVER)
