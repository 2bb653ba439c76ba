"""What the engine tells of its work to whoever keeps statistics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What the engine has done since it started.

    Attributes:
        steps: steps that ran something.
        row_steps: rows over all steps; by ``steps``, how full they were.
        prefill_tokens: prompt tokens that were run.
        reused_tokens: prompt tokens that were not, because their prefix was at hand.
        iterations: iterations of all rows.
        wasted_iterations: those of them that no answer came of: of requests that were given up or failed, and of a
            diverged loop those after its last good state.
        tokens: tokens written.
    """

    steps: int = 0
    row_steps: int = 0
    prefill_tokens: int = 0
    reused_tokens: int = 0
    iterations: int = 0
    wasted_iterations: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """One step that ran something, for whoever keeps statistics.

    Attributes:
        duration_s: seconds.
        rows: requests that ran.
        looping: those of them that ran an iteration.
        prefill_tokens: prompt tokens that were run.
        written: tokens.
        columns: columns of the cache that hold something, all slots together.
    """

    duration_s: float
    rows: int
    looping: int
    prefill_tokens: int
    written: int
    columns: int
