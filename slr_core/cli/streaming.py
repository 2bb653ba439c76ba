"""Print an answer while the engine computes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from slr_core.cli.options import number

if TYPE_CHECKING:
    from slr_core.engine import Engine
    from slr_core.engine.events import Event
    from slr_core.types import Request, Result

_CLEAR_LINE = "\r\x1b[K"


def print_stream(engine: Engine, request: Request) -> Result:
    """Print the text of the answer as it comes, with a line break at its end, and return the result.

    On a terminal, standard error shows the running iteration until the first token is written.

    Raises:
        EngineError: the engine failed.
        KeyboardInterrupt: Ctrl-C was pressed; the request is cancelled.
    """
    from slr_core.engine.events import IterationEvent, TokenEvent

    show_iterations, result = sys.stderr.isatty(), None
    for event in _events(engine, request):
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
    assert result is not None, "an event stream that ends without an error ends with the result"
    return result


def _events(engine: Engine, request: Request) -> Iterator[Event]:
    events: SimpleQueue[Event | None] = SimpleQueue()
    future = engine.submit(request, on_event=events.put)
    future.add_done_callback(lambda _: events.put(None))
    try:
        while (event := events.get()) is not None:
            yield event
        future.result()
    finally:
        future.cancel()
