"""Comparing numbers relative to their size, by math-verify in its own process."""

import pytest

pytest.importorskip("math_verify")

from slr_core.tasks.equivalence import equivalent

DIFFERENT = [
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("10^{-20}", "10^{-21}"),
    ("-10^{-20}", "-10^{-21}"),
    ("-10^{-20}", "10^{-20}"),
    ("e^{-40}", "e^{-41}"),
    ("\\pi\\cdot 10^{-20}", "\\pi\\cdot 10^{-21}"),
    ("\\sqrt{10^{-40}}", "\\sqrt{10^{-42}}"),
    ("1.5\\times 10^{-20}", "1.5\\times 10^{-21}"),
    ("0.00000001", "0.00000002"),
    ("0", "10^{-30}"),
    ("0", "0.0000000001"),
    ("1-10^{-20}", "1-10^{-21}"),
    ("1+10^{-20}", "1"),
    ("2^{100}", "2^{100}+1"),
    ("10^{20}", "10^{20}+1"),
    ("e^{40}", "e^{40}+10^{-9}"),
    ("x+10^{-20}", "x+10^{-21}"),
    ("10^{-20}x", "10^{-21}x"),
    ("0.0000001x", "0.0000002x"),
    ("x=10^{-20}", "x=10^{-21}"),
    ("x>10^{-20}", "x>10^{-21}"),
    ("[0,10^{-20}]", "[0,10^{-21}]"),
    ("10^{-20}i", "10^{-21}i"),
    ("x^2+10^{-20}", "(x+10^{-12})(x-10^{-12})"),
    ("\\begin{pmatrix}0.00000001\\\\1\\end{pmatrix}", "\\begin{pmatrix}0.00000002\\\\1\\end{pmatrix}"),
]
EQUAL = [
    ("\\frac{1}{2004!}", "\\frac{2005}{2005!}"),
    ("10^{-20}", "\\frac{1}{10^{20}}"),
    ("\\frac{3}{10^{20}}", "0.00000000000000000003"),
    ("10^{20}", "100000000000000000000"),
    ("e^{-40}", "\\frac{1}{e^{40}}"),
    ("\\frac13", "0.333333"),
    ("0", "0.0"),
    ("-0", "0"),
    ("9\\%", "9"),
    ("12.5\\%", "\\frac18"),
    ("0.1+0.2", "0.3"),
    ("0.5x", "\\frac{x}{2}"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),
    ("\\cos(\\pi/5)", "\\frac{1+\\sqrt5}{4}"),
    ("\\sin^2 x+\\cos^2 x", "1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2+3i", "3i+2"),
    ("1.5\\pi", "\\frac{3\\pi}{2}"),
]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equivalent(gold, answer)
    assert not equivalent(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold, answer):
    assert equivalent(gold, answer)
    assert equivalent(answer, gold)
