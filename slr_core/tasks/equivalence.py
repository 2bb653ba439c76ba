"""Whether two mathematical answers are the same, by math-verify, within a time limit and from any thread.

Comparing with sympy may take forever (``9^{9^{9^9}}``), and math-verify's own time limit is a signal,
which only a main thread may use. So the comparison runs in one child process, ended when it is late.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock, Thread
from typing import IO

from slr_core._install import missing_extra
from slr_core.errors import ConfigError

_WORKER = Path(__file__).with_name("_equivalence_worker.py")
_START_SECONDS = 120.0  # sympy takes seconds to import, more on a busy machine
_LONGEST = 1000  # characters; no answer of the data has more than a third of it


class Comparer:
    """A child process that compares, started at the first question and again after one that took too long."""

    def __init__(self, seconds: float = 5.0) -> None:
        """Give every comparison ``seconds``."""
        self.seconds = seconds
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify holds the two for equal; False where it fails, or takes too long.

        Raises:
            ConfigError: math-verify is not installed or cannot be started.
        """
        if max(len(gold), len(answer)) > _LONGEST:
            return False
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"gold": gold, "answer": answer}) + "\n")
                process.stdin.flush()
                reply = self._replies.get(timeout=self.seconds)
            except (OSError, queue.Empty):
                reply = None
            if reply is None:  # late, or dead
                self._stop()
                return False
            return bool(json.loads(reply)["equal"])

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        if find_spec("math_verify") is None:
            raise missing_extra("comparing answers", "eval", "no module math_verify")
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process, self._replies = process, queue.SimpleQueue()
        assert process.stdout is not None
        Thread(target=_forward, args=(process.stdout, self._replies), daemon=True).start()
        try:
            ready = self._replies.get(timeout=_START_SECONDS)
        except queue.Empty:
            ready = None
        if ready is None:
            self._stop()
            raise ConfigError(f"math-verify could not be started: {sys.executable} {_WORKER.name} ended or hung")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        with suppress(OSError):  # what was not read yet cannot be flushed
            process.stdin.close()


def _forward(lines: IO[str], replies: queue.SimpleQueue[str | None]) -> None:
    with lines:
        for line in lines:
            replies.put(line)
    replies.put(None)


_shared = Comparer()
atexit.register(_shared.close)


@lru_cache(maxsize=65536)
def equivalent(gold: str, answer: str) -> bool:
    """:meth:`Comparer.equal` of one process for all, remembered."""
    return _shared.equal(gold, answer)
