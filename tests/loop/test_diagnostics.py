import math

import pytest
import torch

from slr_core.config import GuardConfig
from slr_core.loop.convergence import Distances, ExitRule
from slr_core.loop.diagnostics import LoopTracker, is_oscillating, observe, summarize_loop
from slr_core.params import ResolvedLoopParams
from slr_core.types import IterationRecord


def records(*contractions):
    return [
        IterationRecord(
            t=t,
            relative_change=0.5,
            cosine=0.1,
            norm=1.0,
            contraction=contraction,
            kl=None,
            entropy=None,
            adapter=None,
            duration_s=0.0,
        )
        for t, contraction in enumerate(contractions, start=1)
    ]


def test_the_rate_is_the_geometric_mean():
    summary = summarize_loop(records(None, 0.5, 2.0, 0.125), [None] * 4, converged=True)
    assert summary.contraction_rate == pytest.approx((0.5 * 2.0 * 0.125) ** (1 / 3))
    assert summary.converged is True


@pytest.mark.parametrize("contractions", [(), (None,), (None, None), (None, 0.0)])
def test_without_contractions_there_is_no_rate(contractions):
    assert summarize_loop(records(*contractions), [None] * len(contractions), converged=False).contraction_rate is None


@pytest.mark.parametrize(
    ("returns", "oscillating"),
    [
        ([None, 0.0, 0.1], True),
        ([None, 2.0, 0.1, 0.49], True),
        ([None, 0.1, 0.6], False),
        ([None, 0.1, 0.5], False),
        ([0.1], False),
        ([None, 0.1], False),
        ([], False),
        ([0.1, 0.1, None], False),
    ],
)
def test_oscillation_is_coming_back_twice(returns, oscillating):
    assert is_oscillating(returns) is oscillating
    assert summarize_loop(records(), returns, converged=False).oscillating is oscillating


def test_a_period_of_two_oscillates_and_a_spiral_does_not():
    def returns(points):
        moved = [None, None] + [
            abs(points[t] - points[t - 2]) / abs(points[t] - points[t - 1]) for t in range(2, len(points))
        ]
        return moved[1:]

    assert is_oscillating(returns([complex(0.9 + (-1) ** t) for t in range(6)]))
    assert not is_oscillating(returns([0.8**t * complex(math.cos(t), math.sin(t)) for t in range(6)]))


def test_a_converged_loop_does_not_oscillate():
    assert summarize_loop(records(), [0.0, 0.0], converged=True).oscillating is False


def log(most=4, criterion="relative_change", threshold=0.1):
    return LoopTracker(ExitRule(ResolvedLoopParams(most, 0, criterion, threshold, 1), GuardConfig()))


def tell(rows, t, finite=True, return_ratio=None, tops=None, **measured):
    count = len(rows)
    distances = Distances(**{name: torch.full((count,), value) for name, value in measured.items()})
    observe(
        rows,
        t,
        distances,
        finite=torch.tensor([finite] * count),
        return_ratio=None if return_ratio is None else torch.full((count,), return_ratio),
        tops=tops,
        adapter=f"loop_{t:02d}",
        duration_s=0.5,
        elapsed_s=0.5 * t,
    )


def test_what_was_not_measured_is_none_and_settles_nothing():
    row = log(threshold=1e6)
    tell([row], 1, norm=2.0)
    (record,) = row.records
    assert row.exit_reason is None
    assert (record.norm, record.adapter, record.duration_s) == (2.0, "loop_01", 0.5)
    names = ("relative_change", "cosine", "contraction", "kl", "entropy", "thought")
    assert [getattr(record, name) for name in names] == [None] * 6
    assert record.top_tokens == ()


def test_a_contraction_needs_two_steps():
    row = log()
    tell([row], 1, norm=2.0)
    tell([row], 2, norm=2.0, change=0.5, relative_change=0.5)
    tell([row], 3, norm=2.0, change=0.25, relative_change=0.25)
    assert [record.contraction for record in row.records] == [None, None, 0.5]


@pytest.mark.parametrize(
    "criterion",
    ["relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "end_token", "learned", "survival"],
)
def test_each_criterion_reads_its_own_measure(criterion):
    names = ("relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "end_token", "learned", "survival")
    measured = {name: 0.05 if name == criterion else 0.5 for name in names}
    settled, other = log(criterion=criterion), log(criterion=criterion)
    tell([settled], 1, norm=1.0, **measured)
    tell([other], 1, norm=1.0, **{name: 0.55 - value for name, value in measured.items()})
    assert (settled.exit_reason, other.exit_reason) == ("converged", None)


def test_a_row_that_has_ended_is_told_nothing_more():
    short, long = log(most=1), log(most=3)
    for t in (1, 2):
        tell(
            [short, long],
            t,
            norm=1.0,
            change=1.0,
            relative_change=1.0,
            return_ratio=0.5,
            tops=[(("a", 1.0),), (("b", 1.0),)],
        )
    assert (short.exit_reason, long.exit_reason) == ("max_iterations", None)
    assert (len(short.records), len(long.records)) == (1, 2)
    assert (short.kept_iterations, long.kept_iterations, short.elapsed_s, long.elapsed_s) == (1, 2, 0.5, 1.0)
    assert long.records[0].top_tokens == (("b", 1.0),)
    assert long.return_ratios == [0.5, 0.5]
    assert log(most=0).exit_reason == "max_iterations"


def test_what_is_not_finite_is_recorded_as_undefined_and_not_kept():
    row = log()
    tell([row], 1, norm=1.0, change=1.0, relative_change=1.0)
    tell([row], 2, finite=False, norm=math.inf, change=math.nan, relative_change=math.nan, return_ratio=math.nan)
    assert (row.exit_reason, row.kept_iterations) == ("diverged", 1)
    assert row.records[1].norm is row.records[1].relative_change is row.return_ratios[1] is None
