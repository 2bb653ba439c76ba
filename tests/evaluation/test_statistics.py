"""Figures of outcomes against tables, hand values and scipy."""

from itertools import product
from random import Random
from statistics import fmean

import pytest
from scipy import stats

from slr_core.evaluation.statistics import (
    paired_test,
    rank_correlation,
    summarize,
    summarize_by_difficulty,
    wilson_interval,
)
from tests.evaluation.asked import outcome


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (475, 500, 0.927, 0.966), (1, 1, 0.207, 1.0)],
)
def test_wilson_intervals_of_the_tables(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("trials", [1, 3, 50, 300])
def test_the_interval_holds_the_share_and_is_scipys(trials):
    for successes in range(trials + 1):
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1
        theirs = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


# -- two methods -----------------------------------------------------------------------------------------


def pair(both, first, second, neither):
    cells = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    sides = zip(*cells, strict=True)
    return tuple([outcome(f"{i}:x", correct=right) for i, right in enumerate(side)] for side in sides)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(1, 5, 14 / 64), (0, 6, 2 / 64), (6, 0, 2 / 64), (3, 3, 1.0), (0, 1, 1.0), (2, 8, 2 * (1 + 10 + 45) / 1024)],
)
def test_mcnemar_by_hand(first, second, p):
    test = paired_test(*pair(4, first, second, 3))
    assert (test.questions, test.only_first, test.only_second) == (7 + first + second, first, second)
    assert test.p == pytest.approx(p)


def test_mcnemar_is_scipys_exact_binomial():
    for first, second in product(range(7), range(7)):
        if first + second:
            expected = stats.binomtest(first, first + second).pvalue
            assert paired_test(*pair(5, first, second, 1)).p == pytest.approx(expected)
    assert 0 < paired_test(*pair(0, 300, 900, 0)).p < 1e-60


def test_methods_that_never_differ_are_equally_good():
    assert paired_test(*pair(3, 0, 0, 2)).p == 1.0


def test_pairs_are_found_by_question_and_not_by_place():
    first, second = pair(2, 3, 1, 2)
    shuffled = [*second, outcome("99:x")]
    Random(0).shuffle(shuffled)
    assert paired_test(first, shuffled) == paired_test(first, second)
    assert paired_test(first[:4], second).questions == 4


# -- rank correlation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / 22.5**0.5),
        ([1, 1, 1, 2], [5, 5, 6, 6], (1 / 3) ** 0.5),
        ([1, 1], [1, 2], None),
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.4], None),
        ([1, 2], [3, 3], None),
        ([1], [1], None),
    ],
)
def test_spearman_by_hand(x, y, rho):
    assert rank_correlation(x, y) == (None if rho is None else pytest.approx(rho))


def test_spearman_is_scipys():
    rng = Random(0)
    for _ in range(20):
        x, y = ([rng.randrange(6) for _ in range(12)] for _ in range(2))
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


# -- figures ---------------------------------------------------------------------------------------------

OUTCOMES = [
    outcome("0:a", difficulty=3, iterations=1, exit_reason="converged", relative_change=(0.5,)),
    outcome("1:b", correct=False, iterations=3, exit_reason="diverged", relative_change=(None, 0.3, 0.2)),
    outcome("2:c", iterations=2, exit_reason="max_iterations", relative_change=(0.1, None), contraction_rate=None),
    outcome("3:d", iterations=0, exit_reason="", relative_change=(), contraction_rate=0.75, oscillating=True),
]


def test_figures_are_means_over_the_questions():
    figures = summarize(OUTCOMES)
    assert (figures.questions, figures.accuracy, figures.interval) == (4, 0.75, wilson_interval(3, 4))
    assert (figures.iterations, figures.converged, figures.diverged, figures.oscillating) == (1.5, 0.25, 0.25, 0.25)
    assert figures.contraction_rate == pytest.approx(fmean([0.25, 0.25, 0.75]))
    assert (figures.forward_passes, figures.tokens, figures.flops) == (5, 2, 1e6)
    # Over those that got there, and only where it is defined.
    assert figures.relative_change == pytest.approx((0.3, 0.3, 0.2))


def test_what_is_nowhere_defined_has_no_mean():
    figures = summarize([outcome(contraction_rate=None, relative_change=(None, 0.5)), outcome(relative_change=())])
    assert (figures.contraction_rate, figures.relative_change) == (0.25, (None, 0.5))
    assert summarize([outcome(contraction_rate=None)]).contraction_rate is None
    assert summarize([outcome(), outcome(flops=None)]).flops is None
    assert summarize([outcome(), outcome(added_parameters=None)]).added_parameters is None
    assert summarize([outcome(), outcome(added_parameters=0)]).added_parameters == 1200
    assert summarize([outcome(relative_change=())]).relative_change == ()


@pytest.mark.parametrize(
    ("steps", "share"),
    [([True, False, None, True], 2 / 3), ([None, False], 0.0), ([None, None], None)],
)
def test_steps_hold_as_a_share_of_those_that_were_written(steps, share):
    assert summarize([outcome(steps_hold=hold) for hold in steps]).steps_hold == share


def test_levels_are_ascending_and_add_up():
    levels = summarize_by_difficulty(OUTCOMES)
    assert list(levels) == [2, 3]
    assert (levels[2].questions, levels[2].accuracy) == (3, pytest.approx(2 / 3))
    assert levels[3] == summarize(OUTCOMES[:1])
