"""How a loop moved: one record per iteration, and what the records say about stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of one request, as ``POST /trace`` shows it.

    Distances are dimensionless except ``norm`` (length of the state), ``entropy`` and ``kl`` (nats) and
    ``duration_s`` (seconds). ``None`` marks what is undefined (contraction before the second iteration,
    whatever is not finite) or was not asked for (the head's measures outside a trace).
    """

    t: int
    relative_change: float | None
    cosine: float | None
    norm: float | None
    contraction: float | None
    kl: float | None
    entropy: float | None
    adapter: str | None
    duration_s: float
    top_tokens: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Stability:
    """Summary of a trace.

    Attributes:
        contraction_rate: geometric mean of the contractions; below 1 the steps shrink. ``None`` with
            fewer than two iterations.
        oscillating: the loop ended moving between two states: see :func:`is_oscillating`.
        converged: the loop ended because its criterion was met.
    """

    contraction_rate: float | None
    oscillating: bool
    converged: bool


def finite_or_none(value: float | None) -> float | None:
    """JSON has no infinities: whatever is not finite is reported as undefined."""
    return value if value is not None and isfinite(value) else None


def stability(records: Sequence[IterationRecord], returns: Sequence[float | None], converged: bool) -> Stability:
    """Summarise a loop.

    Args:
        records: its iterations in order.
        returns: per iteration |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
        converged: whether the criterion ended it.
    """
    contractions = [r.contraction for r in records if r.contraction is not None and r.contraction > 0]
    rate = exp(sum(map(log, contractions)) / len(contractions)) if contractions else None
    return Stability(rate, is_oscillating(returns) and not converged, converged)


def is_oscillating(returns: Sequence[float | None], iterations: int = 2, closer: float = 0.5) -> bool:
    """Whether each of the last ``iterations`` states lies much closer to the state before the last than to the last.

    A limit cycle of period two keeps coming back: |h_t - h_{t-2}| falls below half of |h_t - h_{t-1}|.
    """
    tail = returns[-iterations:]
    return len(tail) == iterations and all(r is not None and r < closer for r in tail)
