"""Writes log lines on a thread of its own: whoever logs never waits for the stream."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_MOST_LINES = 10_000
"""Lines that wait while the stream is blocked, for instance a pipe that nobody reads."""
_LINES_PER_WRITE = 256
_FLUSH_S = 1.0
_STDERR = 2


def write_stderr(data: bytes) -> None:
    """Write to standard error. Not through ``sys.stderr``: a thread that blocks there would block the end, too."""
    while data:
        data = data[os.write(_STDERR, data) :]


class LogWriter(logging.Handler):
    """A handler whose lines are written by a daemon thread, and dropped and counted while the stream is blocked.

    Args:
        write: writes bytes, and may block.
    """

    def __init__(self, write: Callable[[bytes], None] = write_stderr) -> None:
        super().__init__()
        self._write = write
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._writing = False
        threading.Thread(target=self._run, name="slr-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line."""
        try:
            line = self.format(record)
        except Exception as error:  # a record whose arguments do not fit its message
            line = f"a log record cannot be formatted: {error!r}"
        with self._changed:
            if len(self._lines) >= _MOST_LINES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are written, but not longer than a second."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._lines or self._writing), _FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                lines = [self._lines.popleft() for _ in range(min(len(self._lines), _LINES_PER_WRITE))]
                if self._dropped and not self._lines:
                    lines.append(f"{self._dropped} log lines were dropped: standard error was blocked")
                    self._dropped = 0
                self._writing = True
            with suppress(OSError, ValueError):  # the stream is closed: there is nowhere to report it
                self._write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
