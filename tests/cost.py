"""How the CPU time of a function grows with its input, whatever the machine."""

import time
from collections.abc import Callable


def growth(function: Callable[[int], object], size: int, factor: int) -> float:
    """CPU time at ``factor * size`` over ``factor`` times that at ``size``: 1 if it is linear, ``factor`` if quadratic.

    Both are the least of five, taken in turns.
    """

    def seconds(calls: int, n: int) -> float:
        started = time.process_time()
        for _ in range(calls):
            function(n)
        return time.process_time() - started

    pairs = [(seconds(factor, size), seconds(1, factor * size)) for _ in range(5)]
    return min(large for _, large in pairs) / min(small for small, _ in pairs)
