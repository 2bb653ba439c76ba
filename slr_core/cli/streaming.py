"""Print an answer while the engine computes it."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from slr_core.cli.options import number

if TYPE_CHECKING:
    from slr_core.engine.events import Event
    from slr_core.types import Result

_CLEAR_LINE = "\r\x1b[K"


def print_stream(events: Generator[Event, None, None]) -> Result:
    """Print the text of an answer as it comes, with a line break at its end, and return the result.

    On a terminal, standard error shows the running iteration until the first token is chosen.

    Args:
        events: from :meth:`slr_core.engine.Engine.stream`.

    Raises:
        RequestError: the request cannot be run.
        EngineError: the engine failed.
        KeyboardInterrupt: Ctrl-C was pressed; the request is cancelled.
    """
    from slr_core.engine.events import IterationEvent, TokenEvent

    show_iterations, result = sys.stderr.isatty(), None
    with closing(events):
        for event in events:
            if isinstance(event, IterationEvent):
                if show_iterations:
                    record = event.record
                    line = f"[iteration {record.t}, change {number(record.relative_change)}]"
                    print(f"{_CLEAR_LINE}{line}", end="", file=sys.stderr, flush=True)
            elif isinstance(event, TokenEvent):
                if show_iterations:
                    print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
                    show_iterations = False
                print(event.text, end="", flush=True)
            else:
                result = event.result
    print()
    assert result is not None, "a stream that ends without an error ends with the result"
    return result
