"""Records of a loop's iterations, and the summary of its stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log

from torch import Tensor

from slr_core.loop.convergence import Distances, ExitRule
from slr_core.types import ExitReason, IterationRecord, Stability, finite_or_none


def summarize_loop(
    records: Sequence[IterationRecord], return_ratios: Sequence[float | None], converged: bool
) -> Stability:
    """Summarise a loop.

    Args:
        records: its iterations in order.
        return_ratios: per iteration |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
        converged: whether the criterion ended the loop.
    """
    contractions = [r.contraction for r in records if r.contraction is not None and r.contraction > 0]
    rate = exp(sum(map(log, contractions)) / len(contractions)) if contractions else None
    return Stability(rate, is_oscillating(return_ratios) and not converged, converged)


def is_oscillating(return_ratios: Sequence[float | None], iterations: int = 2, limit: float = 0.5) -> bool:
    """Whether the loop ended in a limit cycle of period two.

    In such a cycle |h_t - h_{t-2}| is small compared with |h_t - h_{t-1}|.

    Args:
        return_ratios: per iteration |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
        iterations: how many of the last ratios must be small.
        limit: a ratio below it is small.
    """
    tail = return_ratios[-iterations:]
    return len(tail) == iterations and all(ratio is not None and ratio < limit for ratio in tail)


@dataclass
class LoopTracker:
    """One request's loop while it runs.

    Attributes:
        rule: decides when the loop ends.
        exit_reason: why it ended; ``None``: it has not.
        kept_iterations: iterations whose result is decoded; fewer than were run after a divergence.
        records: one per iteration.
        return_ratios: per iteration |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
        elapsed_s: seconds from the loop's start to the last iteration.
        survival: the criterion `survival` after the last iteration; 1 before the first, and without a halting head.
    """

    rule: ExitRule
    exit_reason: ExitReason | None = None
    kept_iterations: int = 0
    records: list[IterationRecord] = field(default_factory=list)
    return_ratios: list[float | None] = field(default_factory=list)
    elapsed_s: float = 0.0
    survival: float = 1.0

    def __post_init__(self) -> None:
        if self.rule.settings.max_iterations == 0:
            self.exit_reason = "max_iterations"

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
            finite: whether all values of the state are finite.
            return_ratio: |h_t - h_{t-2}| / |h_t - h_{t-1}|, ``None`` where undefined.
            adapter: name of the active adapter; ``None``: the plain base model.
            duration_s: seconds of this iteration.
            elapsed_s: seconds since the loop began.
            top_tokens: the most likely tokens at the new state and their probabilities.
        """
        clean = {name: finite_or_none(value) for name, value in measured.items()}
        self.exit_reason = self.rule.update(
            t,
            distance=clean.get(self.rule.settings.criterion),
            change=clean.get("change"),
            norm=measured["norm"],
            finite=finite,
        )
        self.kept_iterations = self.rule.last_good_iteration(t, finite) if self.exit_reason == "diverged" else t
        self.elapsed_s = elapsed_s
        self.survival = measured.get("survival", 1.0)
        self.return_ratios.append(finite_or_none(return_ratio))
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
    rows: Sequence[LoopTracker],
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
    """Record iteration ``t`` in every row that still loops; arguments as in :meth:`LoopTracker.observe`, batched."""
    # One transfer from the device per measure, not one per row.
    values = {name: x.tolist() for name, x in vars(distances).items() if x is not None}
    all_finite, returns = finite.tolist(), return_ratio.tolist() if return_ratio is not None else [None] * len(rows)
    for i, row in enumerate(rows):
        if row.exit_reason is None:
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
