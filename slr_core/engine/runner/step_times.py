"""Notice that steps take another time than they used to: the fastest number of threads may then be another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

WINDOW = 32
"""Steps of one shape whose median is compared."""
FACTOR = 2.0
"""Ratio of two medians from which the step time counts as changed, in either direction."""
MIN_INTERVAL_S = 60.0
"""Shortest time in seconds between two measurements of the thread count."""


class StepTimes:
    """Compares the durations of steps with those right after the thread count was measured.

    Steps are compared with steps of the same shape: rows and read positions, both rounded up to powers of two. The
    first :data:`WINDOW` steps of a shape are its reference.

    Args:
        clock: returns seconds.

    Attributes:
        changed: a later window differs by :data:`FACTOR`, and the last measurement is :data:`MIN_INTERVAL_S` old.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Start again, because the thread count has just been measured."""
        self.changed = False
        self._measured_at = self.clock()
        self._reference: dict[tuple[int, int], float] = {}
        self._window: dict[tuple[int, int], list[float]] = {}

    def record(self, rows: int, width: int, duration_s: float) -> None:
        """Note the duration of a step of single positions.

        Args:
            rows: rows of the step.
            width: positions that it read.
            duration_s: its duration in seconds.
        """
        shape = (rows - 1).bit_length(), (width - 1).bit_length()
        window = self._window.setdefault(shape, [])
        window.append(duration_s)
        if len(window) < WINDOW:
            return
        typical = median(window)
        window.clear()
        reference = self._reference.setdefault(shape, typical)
        differs = not reference / FACTOR < typical < reference * FACTOR
        self.changed |= differs and self.clock() - self._measured_at >= MIN_INTERVAL_S
