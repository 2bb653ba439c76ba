"""A benchmark's figures: ratios of two times or rates that were measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what is divided by what.
        model: name of the model.
        ratio: ratio of two times or of two rates.
        target: what the ratio should be; ``reported`` if there is no target.
        detail: the measured values.
    """

    name: str
    model: str
    ratio: float
    target: str
    detail: str


def best(turns: int, *sides: Callable[[], object]) -> list[float]:
    """The best time of each side in seconds; the sides alternate ``turns`` times."""
    times = [float("inf")] * len(sides)
    for _ in range(turns):
        for side, run in enumerate(sides):
            began = time.perf_counter()
            run()
            times[side] = min(times[side], time.perf_counter() - began)
    return times
