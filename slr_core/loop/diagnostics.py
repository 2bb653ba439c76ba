"""How a loop moved: one record per iteration, and what the records say about stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

from torch import Tensor

from slr_core.loop.convergence import Distances, ExitRule
from slr_core.types import ExitReason, IterationRecord, Stability, finite_or_none


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


@dataclass
class RowLog:
    """One request while its batch loops: its exit rule, and what was seen of it so far."""

    rule: ExitRule
    reason: ExitReason | None = None
    kept_iterations: int = 0
    records: list[IterationRecord] = field(default_factory=list)
    returns: list[float | None] = field(default_factory=list)
    elapsed_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rule.settings.max_iterations == 0:
            self.reason = "max_iterations"

    def observe(
        self,
        t: int,
        measured: Mapping[str, float],
        *,
        finite: bool,
        return_ratio: float | None,
        adapter: str | None,
        duration_s: float,
        elapsed_s: float,
        top_tokens: tuple[tuple[str, float], ...] = (),
    ) -> None:
        """Record iteration ``t`` and decide whether it is the last.

        Args:
            t: the iteration, from 1.
            measured: the row's entries of :class:`slr_core.loop.convergence.Distances`, by name.
            finite: whether the whole state is finite.
            back: |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
            adapter: the adapter that acted.
            duration_s: seconds of this iteration.
            elapsed_s: seconds since the loop began.
            top_tokens: the likeliest tokens at the new state and their probabilities.
        """
        clean = {name: finite_or_none(value) for name, value in measured.items()}
        self.reason = self.rule.update(
            t,
            distance=clean.get(self.rule.settings.criterion),
            change=clean.get("change"),
            norm=measured["norm"],
            finite=finite,
        )
        self.kept_iterations = self.rule.last_good(t, finite) if self.reason == "diverged" else t
        self.elapsed_s = elapsed_s
        self.returns.append(finite_or_none(return_ratio))
        self.records.append(
            IterationRecord(
                t=t,
                relative_change=clean.get("relative_change"),
                cosine=clean.get("cosine"),
                norm=clean["norm"],
                contraction=finite_or_none(self.rule.contraction),
                kl=clean.get("kl"),
                entropy=clean.get("entropy"),
                adapter=adapter,
                duration_s=duration_s,
                top_tokens=top_tokens,
            )
        )


def observe(
    rows: Sequence[RowLog],
    t: int,
    distances: Distances,
    *,
    finite: Tensor,
    return_ratio: Tensor | None,
    tops: Sequence[tuple[tuple[str, float], ...]] | None,
    adapter: str | None,
    duration_s: float,
    elapsed_s: float,
) -> None:
    """Tell every row that still loops what iteration ``t`` did to it; the arguments are those of a row, batched."""
    # One transfer per measure and iteration, none per row.
    values = {name: x.tolist() for name, x in vars(distances).items() if x is not None}
    all_finite, returns = finite.tolist(), return_ratio.tolist() if return_ratio is not None else [None] * len(rows)
    for i, row in enumerate(rows):
        if row.reason is None:
            row.observe(
                t,
                {name: x[i] for name, x in values.items()},
                finite=all_finite[i],
                return_ratio=returns[i],
                adapter=adapter,
                duration_s=duration_s,
                elapsed_s=elapsed_s,
                top_tokens=tops[i] if tops else (),
            )
