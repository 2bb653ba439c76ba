"""Figures about the engine's work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineCounters:
    """Totals since the engine started.

    Attributes:
        steps: steps that ran at least one request.
        row_steps: requests run, summed over all steps; divided by ``steps`` it is the mean batch size.
        prefill_tokens: prompt tokens that were run.
        reused_tokens: prompt tokens that were not run, because the prefix cache had them.
        iterations: iterations, summed over all requests.
        wasted_iterations: iterations without effect on an answer: those of cancelled and failed requests, and those
            after the last good state of a diverged loop.
        nonfinite: loops that ended with a state that is not finite.
        tokens: tokens that were chosen for answers.
    """

    steps: int = 0
    row_steps: int = 0
    prefill_tokens: int = 0
    reused_tokens: int = 0
    iterations: int = 0
    wasted_iterations: int = 0
    nonfinite: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class StepStats:
    """One step that ran at least one request.

    Attributes:
        duration_s: seconds.
        rows: requests that ran.
        iterations: requests that ran an iteration.
        prefill_tokens: prompt tokens that were run.
        tokens: tokens of answers.
        used_positions: cache positions in use at the end of the step, all slots together.
    """

    duration_s: float
    rows: int
    iterations: int
    prefill_tokens: int
    tokens: int
    used_positions: int
