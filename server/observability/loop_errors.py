"""Errors of the event loop itself, such as a lack of file descriptors, in a bounded number of log lines."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_EVERY_S = 10.0
_KINDS = 64


class LoopErrorLog:
    """The exception handler of an event loop: logs each kind of error at most every ten seconds, with a count.

    Args:
        clock: returns seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}
        """Of each kind: when it was last logged, and how often it has happened since."""

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error; see :meth:`asyncio.loop.set_exception_handler`."""
        error = context.get("exception")
        kind = str(context.get("message", "")), type(error).__name__
        now = self._clock()
        logged_at, more = self._kinds.get(kind, (-_EVERY_S, 0))
        if now < logged_at + _EVERY_S:
            self._kinds[kind] = logged_at, more + 1
            return
        if len(self._kinds) >= _KINDS:
            self._kinds.clear()
        self._kinds[kind] = now, 0
        repeated = f" ({more} more in the last {now - logged_at:.0f} s)" if more else ""
        # A lack of descriptors has no cause in the code, so its traceback says nothing.
        trace = None if isinstance(error, OSError) else error
        logger.error("event loop: %s: %s%s", kind[0], error, repeated, exc_info=trace)
