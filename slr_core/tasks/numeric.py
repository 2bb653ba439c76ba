"""Numbers compared by their relative difference, however small: what math-verify compares by absolute difference.

math-verify holds 10^-20 and 10^-21 for equal: it rounds to six decimals, and evaluates a difference only down to
10^-15. :func:`compare_relatively` adds a second condition to that comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sympy import (  # type: ignore[import-untyped]
    Abs,
    Add,
    Expr,
    Float,
    Integer,
    MatrixBase,
    Rational,
    UnevaluatedExpr,
)

_DECIMAL_TOLERANCE = Rational(5, 10**6)  # of decimal fractions: six significant digits, as 0.333333 for 1/3
_EXACT_TOLERANCE = Rational(1, 10**80)  # of exact expressions: sympy evaluates with 100 digits

Comparison = Callable[[Any, Any, int, int], bool]


def compare_relatively(compare: Comparison) -> Comparison:
    """The numeric comparison of math-verify, which then also compares relative to the size of the numbers."""

    def compare_both(gold: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
        return compare(gold, answer, float_rounding, numeric_precision) and not differ(gold, answer)

    return compare_both


def differ(gold: Any, answer: Any) -> bool:
    """Whether two expressions that are close differ relative to their size; False where that cannot be decided.

    Decimal fractions differ in their first six significant digits, exact expressions in their first 80 digits.
    Matrices are compared element by element elsewhere.
    """
    if isinstance(gold, MatrixBase) or isinstance(answer, MatrixBase):
        return False
    try:
        if _is_whole(gold) and _is_whole(answer):
            return False  # compared exactly already; 9 % and 9 are equal to math-verify
        values = [x.doit() for x in (gold, answer)]
        if any(x.has(Float) for x in values):
            return _coefficients_differ(*values)
        return any(_is_nonzero(values[0] - values[1], point) for point in (0, 1))
    except (TypeError, ValueError, AttributeError):  # not numbers
        return False


def _is_whole(x: Any) -> bool:
    """Whether it is an integer, or an integer percentage."""
    percent = UnevaluatedExpr(Rational(1, 100))
    return bool(x.is_Integer or (x.is_Mul and x.args[1:] == (percent,) and x.args[0].is_Integer))


def _coefficients_differ(gold: Expr, answer: Expr) -> bool:
    left, right = (x.expand().as_coefficients_dict() for x in (gold, answer))
    terms = {*left, *right}
    if terms == {*left} == {*right}:
        pairs = [(left[term], right[term]) for term in terms]
    elif not gold.free_symbols and not answer.free_symbols:
        pairs = [(gold.evalf(), answer.evalf())]
    else:
        return False
    return any(bool(Abs(a - b) > _DECIMAL_TOLERANCE * max(Abs(a), Abs(b))) for a, b in pairs)


def _is_nonzero(difference: Expr, point: int) -> bool:
    """Whether an exact expression is not zero, with numbers in place of its symbols."""
    symbols = sorted(difference.free_symbols, key=str)
    places = {symbol: Rational(7 + 4 * i + 2 * point, 5 + 3 * i) for i, symbol in enumerate(symbols)}
    terms = [term.subs(places) for term in Add.make_args(difference)]
    value = Add(*terms)
    if isinstance(value, Rational):
        return bool(value != Integer(0))
    scale = max(Abs(term.evalf()) for term in terms)
    return bool(Abs(value.evalf()) > _EXACT_TOLERANCE * scale)
