"""Whether two mathematical answers are equal, by math-verify, within a time limit and from any thread.

A comparison by sympy may never end (``9^{9^{9^9}}``), and math-verify's own time limit is a signal, which works in the
main thread only. Comparisons therefore run in a child process, which pebble ends when one exceeds its time.
"""

from __future__ import annotations

import atexit
from functools import lru_cache
from importlib.util import find_spec
from multiprocessing import get_context
from threading import Lock
from typing import TYPE_CHECKING

from slr_core._install import missing_extra
from slr_core.errors import ConfigError
from slr_core.tasks._equivalence_worker import compare, set_up_worker

if TYPE_CHECKING:
    from pebble import ProcessPool

_START_S = 120.0  # sympy takes seconds to import, more on a busy machine
_MAX_CHARACTERS = 1000  # no answer of the data has more than a third of it


class Comparer:
    """A child process that compares, started with the first comparison and again after one that took too long."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        """Give every comparison ``timeout_s`` seconds."""
        self.timeout_s = timeout_s
        self._lock = Lock()
        self._pool: ProcessPool | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify calls the two equal; False where the comparison fails or takes too long.

        Raises:
            ConfigError: math-verify or pebble is not installed, or the child process does not start.
        """
        if max(len(gold), len(answer)) > _MAX_CHARACTERS:
            return False
        missing = [name for name in ("math_verify", "pebble") if find_spec(name) is None]
        if missing:
            raise missing_extra("comparing answers", "eval", f"not installed: {', '.join(missing)}")
        with self._lock:
            for _ in range(2):  # a second time if the child process died before this comparison
                result = self._run(gold, answer)
                if result is not None:
                    return result
        raise ConfigError(
            "the process that compares answers does not start (its standard error says why); in a script, "
            "grade under `if __name__ == '__main__':`"
        )

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _run(self, gold: str, answer: str) -> bool | None:
        """The result, or None where no child process took the comparison."""
        from pebble import ProcessExpired, ProcessPool

        if self._pool is None:
            # Not "fork": the parent may run threads.
            self._pool = ProcessPool(max_workers=1, initializer=set_up_worker, context=get_context("spawn"))
        future = None
        try:
            future = self._pool.schedule(compare, args=(gold, answer), timeout=self.timeout_s)
            return future.result(timeout=_START_S + self.timeout_s)
        except ProcessExpired:  # for example out of memory
            return False
        except TimeoutError:
            if future is not None and future.done():
                return False
        except RuntimeError:  # the pool has no process
            pass
        self._stop()
        return None

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()


_shared = Comparer()
atexit.register(_shared.close)


@lru_cache(maxsize=65536)
def equivalent(gold: str, answer: str) -> bool:
    """:meth:`Comparer.equal` in one child process for all callers; results are cached."""
    return _shared.equal(gold, answer)
