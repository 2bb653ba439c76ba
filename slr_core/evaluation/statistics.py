"""Summaries of outcomes, and paired tests between methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean

from slr_core.evaluation.outcomes import Outcome


@dataclass(frozen=True)
class Summary:
    """Figures over a set of questions.

    Attributes:
        questions: number of questions.
        accuracy: share of right answers.
        interval: 95 % Wilson score interval of the accuracy.
        steps_hold: share of valid steps among the answers with written steps; ``None`` if there are none.
        iterations: mean number of loop iterations.
        converged: share of loops that the criterion ended.
        diverged: share of loops that the divergence guard ended.
        oscillating: share of loops that ended alternating between two states.
        contraction_rate: mean over the questions for which it is defined.
        forward_passes: mean number of passes of the base model, each question alone.
        tokens: mean number of generated tokens.
        flops: mean of the estimated floating-point operations; ``None`` if unknown.
        added_parameters: parameters that the loop adds to the base, 0 if no loop ran; ``None`` if unknown.
        seconds: mean share of the wall time of the batches.
        relative_change: mean relative change at iteration 1, 2, ... over the questions that reached it.
    """

    questions: int
    accuracy: float
    interval: tuple[float, float]
    steps_hold: float | None
    iterations: float
    converged: float
    diverged: float
    oscillating: float
    contraction_rate: float | None
    forward_passes: float
    tokens: float
    flops: float | None
    added_parameters: int | None
    seconds: float
    relative_change: tuple[float | None, ...]


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Summarize one or more outcomes."""
    changes = [
        [o.relative_change[t] for o in outcomes if len(o.relative_change) > t] for t in range(_deepest(outcomes))
    ]
    right = sum(o.correct for o in outcomes)
    flops = [o.flops for o in outcomes if o.flops is not None]
    added = [o.added_parameters for o in outcomes if o.added_parameters is not None]
    return Summary(
        questions=len(outcomes),
        accuracy=right / len(outcomes),
        interval=wilson_interval(right, len(outcomes)),
        steps_hold=_mean([o.steps_hold for o in outcomes]),
        iterations=fmean(o.iterations for o in outcomes),
        converged=fmean(o.exit_reason == "converged" for o in outcomes),
        diverged=fmean(o.exit_reason == "diverged" for o in outcomes),
        oscillating=fmean(o.oscillating for o in outcomes),
        contraction_rate=_mean([o.contraction_rate for o in outcomes]),
        forward_passes=fmean(o.forward_passes for o in outcomes),
        tokens=fmean(o.tokens for o in outcomes),
        flops=fmean(flops) if len(flops) == len(outcomes) else None,
        added_parameters=max(added) if len(added) == len(outcomes) else None,
        seconds=fmean(o.seconds for o in outcomes),
        relative_change=tuple(_mean(at_t) for at_t in changes),
    )


def summarize_by_difficulty(outcomes: Sequence[Outcome]) -> dict[int, Summary]:
    """Summarize per number of reasoning steps, ascending."""
    levels = sorted({o.difficulty for o in outcomes})
    return {level: summarize([o for o in outcomes if o.difficulty == level]) for level in levels}


def _deepest(outcomes: Sequence[Outcome]) -> int:
    return max(len(o.relative_change) for o in outcomes)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927), which is valid near 0 and 1, too."""
    p = successes / trials
    z = 1.96  # 95 %
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # It contains p, which rounding would deny at 0 and 1.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class PairedTest:
    """A paired test of two methods on the same questions.

    Attributes:
        questions: number of questions that both answered.
        only_first: number that only the first method answers right.
        only_second: number that only the second method answers right.
        p: p-value of the two-sided exact McNemar test; the null hypothesis is that both are equally accurate.
    """

    questions: int
    only_first: int
    only_second: int
    p: float


def paired_test(first: Sequence[Outcome], second: Sequence[Outcome]) -> PairedTest:
    """Compare two methods question by question (McNemar, 1947; exact, from the binomial distribution)."""
    others = {o.key: o for o in second}
    pairs = [(o.correct, others[o.key].correct) for o in first if o.key in others]
    only_first, only_second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    differ = only_first + only_second
    tail = sum(comb(differ, k) for k in range(min(only_first, only_second) + 1)) / 2**differ
    return PairedTest(len(pairs), only_first, only_second, min(1.0, 2 * tail))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho, ties at their mean rank; ``None`` if one side is constant."""
    a, b = _ranks(x), _ranks(y)
    mean_a, mean_b = fmean(a), fmean(b)
    spread = sqrt(sum((v - mean_a) ** 2 for v in a) * sum((v - mean_b) ** 2 for v in b))
    return sum((v - mean_a) * (w - mean_b) for v, w in zip(a, b, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks
