"""Where an answer ends, and how numbers are read."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slr_core.tasks import get_task
from slr_core.tasks.base import Example
from slr_core.tasks.reading import ANY_TEXT, as_fractions, first_answer, number, stated_number
from tests.cost import growth

# -- another question or turn after the answer -----------------------------------------------------------

ANSWERS = ["#### 18", "9 * 2 = 18\n#### 18", "The answer is 18.", "Answer: 18", "\\boxed{18}", "9 * 2 = 18", "18"]
NEXT = [
    "\n\nQuestion: Tom has 3 pens and buys 2. How many now?\nTom has 3 + 2 = 5.\n#### 5",
    "\nQuestion: Tom has 5.\nAnswer: 5",
    "\n\nQ: How many?\nA: The answer is 5.",
    "\n\n**Problem 2:** How many? \\boxed{5}",
    "\n\nQuestion 2: How many?\n5",
    "\nUser: How many?\nAssistant: #### 5",
    "\n\n### Instruction\nHow many? \\boxed{5}",
    "\nHuman: and now?\nThe answer is 5.",
    "<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n#### 5",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow many?\n\\boxed{5}",
    "</s><s>[INST] How many? [/INST] The answer is 5.",
    "<end_of_turn>\n<start_of_turn>user\nHow many?\n5",
    "<|endoftext|>Tom has 5 pens. #### 5",
]


@pytest.mark.parametrize("following", NEXT)
@pytest.mark.parametrize("answer", ANSWERS)
def test_next_question(answer, following):
    for name in ("gsm8k", "text:number", "math"):
        task = get_task(name)
        assert task.grade(Example("q", (), "18"), answer + following), name
        assert not task.grade(Example("q", (), "5"), answer + following), name


@pytest.mark.parametrize("following", NEXT)
def test_next_question_of_other_tasks(following):
    following = following.replace("5", "False")
    for answer in ("It follows.\n#### True", "The answer is True.", "True"):
        for name in ("prontoqa", "reachability", "text", "text:contains"):
            assert get_task(name).grade(Example("q", (), "True"), answer + following), (name, answer)
            assert not get_task(name).grade(Example("q", (), "False"), answer + following), (name, answer)
    sentence = "Tom is a rompus."
    assert get_task("prosqa").grade(Example("q", (), sentence), f"steps.\n### {sentence}{following}")
    assert get_task("text:regex=[A-Z]{2}").grade(Example("q", (), "AB"), f"AB{following.replace('False', 'XY')}")
    assert get_task("text:choice").grade(Example("q", (), "B"), f"#### B{following.replace('False', 'C')}")


def test_next_question_without_label():
    text = "9 * 2 = 18\n#### 18\nTom has 3 pens and buys 2 more. How many pens does he have now?\n3 + 2 = 5\n#### 5"
    assert stated_number(text).values == (18,)
    assert stated_number("#### 5\nWait, is that really the right number of eggs?\n#### 18").values == (18,)
    assert stated_number("#### 5\nIs that number of eggs a day correct?\nNo: #### 18").values == (18,)


@pytest.mark.parametrize(
    "text",
    [
        "Question: How many eggs, if 9 are sold for $2?\nAnswer: 18",
        "Let me restate it:\nQuestion: How many?\n#### 18",
        "Let me think about the problem step by step.\n\nProblem: How many?\n9 * 2 = 18",
        "<|im_start|>assistant\n#### 18<|im_end|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nThe answer is 18.<|eot_id|>",
        "#### 5\n#### 18",
        "The answer is 5. Wait, the answer is 18.",
        "\\boxed{5}, no: \\boxed{18}",
        "The answer to the question: 18",
    ],
)
def test_same_question(text):
    assert stated_number(text).values == (18,)


def test_restated_question_of_any_text():
    text = "I will first say what is asked, then answer.\nQuestion: What is the capital of France?\nAnswer: Paris"
    assert first_answer(text, ANY_TEXT) == text
    assert get_task("text").grade(Example("q", (), "Paris"), text)


@pytest.mark.parametrize(
    "text", ["# " * 50_000, "<|im_end|>" * 20_000, "\nQuestion:" * 20_000, "a " * 50_000 + "?", "#### 1\n" * 20_000]
)
def test_long_text(text):
    assert len(first_answer(text)) <= len(text)


@given(st.text("18 #\n:?QUser<|>_endimansw", max_size=60))
def test_first_answer_is_a_beginning(text):
    for says in (None, ANY_TEXT):
        first = first_answer(text, says)
        assert first.strip() in text
        assert first_answer(first, says) == first


# -- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.\\overline{3}", Fraction(1, 3)),
        ("0.\\overline{ 3 }", Fraction(1, 3)),
        ("0.\\bar{3}", Fraction(1, 3)),
        ("0.\\bar3", Fraction(1, 3)),
        ("0.\\dot{3}", Fraction(1, 3)),
        ("0.(3)", Fraction(1, 3)),
        ("0.3\u0305", Fraction(1, 3)),
        ("0.3\u0307", Fraction(1, 3)),
        (".\\overline{3}", Fraction(1, 3)),
        ("-0.\\overline{3}", Fraction(-1, 3)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("0.1(6)", Fraction(1, 6)),
        ("0.\\overline{142857}", Fraction(1, 7)),
        ("0.\\dot{1}4285\\dot{7}", Fraction(1, 7)),
        ("0.1\u03074285\u03077\u0307".replace("5\u0307", "5"), Fraction(1, 7)),
        ("0.\\bar{1}\\bar{2}", Fraction(4, 33)),
        ("2.\\overline{9}", Fraction(3)),
        ("1,234.\\overline{5}", Fraction(11111, 9)),
    ],
)
def test_repeating_decimal(text, value):
    assert number(text) == value
    assert stated_number(f"First 3. The answer is ${text}$.").values == (value,)


def test_not_a_repeating_decimal():
    for text in ("\\overline{3}", "3(3)", "0.\\overline{x}", "x.(3)"):
        assert as_fractions(text) == text
    long = f"0.({'1' * 200})"
    assert as_fractions(long) == long


@pytest.mark.parametrize("gold", ["1", "5", "1.5", "15"])
@pytest.mark.parametrize("text", ["1,5", "The answer is 1,5.", "#### 1,5", "\\boxed{1,5}", "So it is 1,5"])
def test_comma_of_a_list(gold, text):
    for name in ("gsm8k", "svamp", "arithmetic", "text:number", "math"):
        assert not get_task(name).grade(Example("q", (), gold), text)


@pytest.mark.parametrize("text", ["The total is 12 (see 3)", "(3)", "3"])
def test_a_bracket_around_a_number_is_no_part_of_it(text):
    assert stated_number(text).text == "3"


def test_comma():
    assert [number(text) for text in ("1,500", "1,234,567.5", "12,34,567", "0,500", "1.5,2.5")] == [
        1500,
        Fraction("1234567.5"),
        None,
        None,
        None,
    ]
    assert get_task("math").grade(Example("q", (), "1,5"), "\\boxed{5,1}")


@pytest.mark.parametrize(
    ("before", "repeated", "after", "size", "factor"), [(".", "1\u0304", "1", 6, 4), ("# x", " ", "\ny", 1_200, 8)]
)
def test_long_runs_are_read_in_linear_time(before, repeated, after, size, factor):
    """Trying every division of a run takes exponential time in the first, and quadratic time in the second."""
    assert growth(lambda n: stated_number(before + repeated * n + after), size, factor) < 3
