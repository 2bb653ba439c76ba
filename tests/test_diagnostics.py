import math

import pytest

from slr_core.diagnostics import IterationRecord, finite_or_none, is_oscillating, stability


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
    summary = stability(records(None, 0.5, 2.0, 0.125), [None] * 4, converged=True)
    assert summary.contraction_rate == pytest.approx((0.5 * 2.0 * 0.125) ** (1 / 3))
    assert summary.converged is True


@pytest.mark.parametrize("contractions", [(), (None,), (None, None), (None, 0.0)])
def test_without_contractions_there_is_no_rate(contractions):
    assert stability(records(*contractions), [None] * len(contractions), converged=False).contraction_rate is None


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
    assert stability(records(), returns, converged=False).oscillating is oscillating


def test_a_period_of_two_oscillates_and_a_spiral_does_not():
    def returns(points):
        moved = [None, None] + [
            abs(points[t] - points[t - 2]) / abs(points[t] - points[t - 1]) for t in range(2, len(points))
        ]
        return moved[1:]

    assert is_oscillating(returns([complex(0.9 + (-1) ** t) for t in range(6)]))
    assert not is_oscillating(returns([0.8**t * complex(math.cos(t), math.sin(t)) for t in range(6)]))


def test_a_converged_loop_does_not_oscillate():
    assert stability(records(), [0.0, 0.0], converged=True).oscillating is False


def test_what_is_not_finite_is_undefined():
    assert [finite_or_none(x) for x in (1.5, 0.0, None, math.nan, math.inf, -math.inf)] == [1.5, 0.0, *[None] * 4]
