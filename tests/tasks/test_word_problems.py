from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slr_core.tasks import get_task
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.reading import number, numbers, stated_number, statement
from slr_core.tasks.word_problems import close, plain

FAMILY = ["gsm8k", "gsm_hard", "svamp", "multiarith", "asdiv"]

# -- reading numbers -------------------------------------------------------------------------------------


@given(st.integers(-(10**12), 10**12))
def test_a_whole_number_is_read_however_it_is_dressed(n):
    for text in (f"{n}", f"{n:,}", f"${n:,}", f"{n}.00", f"**{n}**", f"({n})", f"\\${n:,}", f"{n}km", f"= {n}."):
        assert [x.values[0] for x in numbers(text)] == [n], text
        assert stated_number(f"First 3, then 4. The answer is {text}").values[0] == n, text


@given(st.integers(-999, 999), st.integers(2, 99))
def test_fractions_are_read(top, bottom):
    sign, size = "-" * (top < 0), abs(top)
    for text in (
        f"{sign}{size}/{bottom}",
        f"{sign}\\frac{{{size}}}{{{bottom}}}",
        f"{sign}\\dfrac{{{size}}}{{{bottom}}}",
    ):
        assert number(text) == Fraction(top, bottom)
    if top > 0:
        assert number(f"7 {top}/{bottom}") == number(f"7\\frac{{{top}}}{{{bottom}}}") == 7 + Fraction(top, bottom)


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x == 0 or 1e-200 < abs(x) < 1e200))
def test_a_float_as_a_program_prints_it_is_read_exactly(x):
    assert number(repr(x)) == Fraction(repr(x))


@given(st.text(alphabet="0123456789.,-+/:%$eE^\\{}()=# \n*x½²٣answeri", max_size=40))
def test_nothing_that_is_written_makes_a_reader_raise(text):
    for name in FAMILY:
        task = get_task(name)
        found = task.extract(text)
        assert found is None or found.strip() == found != ""
        assert isinstance(task.grade(Example("q", (), "5"), text), bool)


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "1," * 50_000, "the answer is " * 20_000, "\\boxed{" * 20_000, "#" * 100_000, "1/" * 50_000]
)
@pytest.mark.parametrize("name", ["gsm8k", "asdiv", "prontoqa", "state_tracking", "prosqa", "arithmetic"])
def test_a_very_long_text_is_graded_too(name, text):
    assert not get_task(name).grade(Example("q", (), "5"), text)


def test_only_the_end_of_a_long_text_is_read():
    assert get_task("gsm8k").grade(Example("q", (), "72"), "step 3 of 9. " * 10_000 + "#### 72")
    assert not get_task("gsm8k").grade(Example("q", (), "72"), "#### 72\n" + "and so on. " * 10_000)


@pytest.mark.parametrize(
    ("text", "words", "marked"),
    [
        ("so 72", "so 72", False),
        ("#### 72 clips\nDone.", "72 clips", True),
        ("#### 1\n#### 2\n", "2", True),
        ("# Heading\n72", "# Heading\n72", False),
        ("steps\n## 72", "72", True),
        ("The answer is 3.5 m. Good.", "3.5 m", True),
        ("Answer: Mrs. Hilt. Good.", "Mrs. Hilt", True),
        ("ANSWER = 7", "7", True),
        ("\\boxed{\\frac{1}{2}} cm", "\\frac{1}{2}", True),
        ("\\boxed{1} The answer is 2.", "2", True),
        ("The answer is \\boxed{2}.", "2", True),
        ("The answer is 2. Wait: 3", ". Wait: 3", False),
        ("The answer is 2. Wait a moment.", "2", True),
    ],
)
def test_the_last_explicit_statement_is_the_answer(text, words, marked):
    found = statement(text)
    assert (found.words, found.marked) == (words, marked)


def test_number_tolerance():
    assert close(Fraction("72.001"), Fraction(72))
    assert not close(Fraction("72.0011"), Fraction(72))
    assert not close(Fraction(10**9 + 1), Fraction(10**9))
    assert close(Fraction("0.5005"), Fraction("0.5"))
    assert not close(Fraction("0.5006"), Fraction("0.5"))
    assert not close(Fraction(0), Fraction("0.0000001"))
    assert close(Fraction(0), Fraction(0))
    assert not close(Fraction("0.0001"), Fraction(0))


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.0, "5"), ("9", "9"), (" 12.0 ", "12"), (2.5, "2.5"), (-9867630.0, "-9867630"), (2e-06, "2e-06")],
)
def test_numbers_of_the_hub_are_written_as_in_the_files(value, text):
    assert plain(value) == text


# -- rows of the public sets -----------------------------------------------------------------------------

ROWS = {
    "gsm8k": (
        {
            "question": "How many?",
            "answer": "Half is 48/2 = <<48/2=24>>24.\nAll: 48+24 = <<48+24=72>>1,072.\n#### 1,072",
        },
        Example(
            "How many?",
            ("Half is 48/2 = 24.", "All: 48+24 = 1,072."),
            "1072",
            {"eq_steps": ["<<48/2=24>>", "<<48+24=72>>"], "answer_raw": "1,072"},
        ),
    ),
    "gsm_hard": (
        {"input": "How much?", "code": "def solution(): ...", "target": -9867630.0},
        Example("How much?", (), "-9867630"),
    ),
    "svamp": (
        {
            "ID": "chal-2",
            "Body": "Dan had $ 3 left. He had $ 4 at the start",
            "Question": "How much did the candy bar cost?",
            "Equation": "( 4.0 - 3.0 )",
            "Answer": "1.0",
            "Type": "Subtraction",
        },
        Example(
            "Dan had $ 3 left. He had $ 4 at the start. How much did the candy bar cost?",
            ("( 4.0 - 3.0 ) = 1",),
            "1",
            {"id": "chal-2", "type": "Subtraction"},
        ),
    ),
    "multiarith": ({"question": " How many? ", "final_ans": "9"}, Example("How many?", (), "9")),
    "asdiv": (
        {
            "body": "Seven red apples and two green apples are in the basket.",
            "question": "How many apples are in the basket?",
            "solution_type": "Addition",
            "answer": "9 (apples)",
            "formula": "7+2=9",
        },
        Example(
            "Seven red apples and two green apples are in the basket. How many apples are in the basket?",
            ("7+2=9",),
            "9",
            {"answer_raw": "9 (apples)", "solution_type": "Addition"},
        ),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_row_of_the_public_set_becomes_an_example(name):
    row, example = ROWS[name]
    assert get_task(name).from_row(row) == example
    assert get_task(name).grade(example, f"The answer is {example.answer}.")


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("3:30 p.m.", "3:30 p.m."),
        ("Yes", "Yes"),
        ("-2 (degrees)", "-2"),
        ("5/2", "5/2"),
        ("5; 3", "5; 3"),
        ("6th", "6th"),
    ],
)
def test_asdiv_answer_without_unit(raw, answer):
    row = ROWS["asdiv"][0] | {"answer": raw}
    assert get_task("asdiv").from_row(row).answer == answer


# -- gold answers through the readers --------------------------------------------------------------------


def solutions(example):
    """The gold solution as a model would write it: GSM8K's form, Coconut's, CODI's, and the answer alone."""
    steps = "".join(f"{step}\n" for step in example.steps)
    raw = example.extra.get("answer_raw", example.answer)
    return (f"{steps}#### {raw}", f"{steps}### {example.answer}", f"{steps}The answer is {raw}.", example.answer)


def misread(name, examples):
    task = get_task(name)
    return [i for i, e in enumerate(examples) if not all(task.grade(e, text) for text in solutions(e))]


FILES = [
    ("gsm8k", "gsm8k/train"),
    ("gsm8k", "gsm8k_aug/valid"),
    ("gsm8k", "gsm8k_aug/train_noaug_eq"),
    ("gsm_hard", "gsm_hard/test"),
    ("svamp", "svamp/test"),
    ("asdiv", "asdiv/test"),
]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_sample_of_gold_solutions_is_graded_right(name, file, shared_data):
    examples = read_jsonl(shared_data / f"{file}.jsonl.gz")
    assert misread(name, examples[:: len(examples) // 300 + 1]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), FILES)
def test_every_gold_solution_is_graded_right(name, file, shared_data):
    assert misread(name, read_jsonl(shared_data / f"{file}.jsonl.gz")) == []


@pytest.mark.parametrize(("name", "file"), FILES)
def test_the_gold_solution_of_the_next_question_is_graded_wrong(name, file, shared_data):
    examples = read_jsonl(shared_data / f"{file}.jsonl.gz")[:300]
    task = get_task(name)
    for example, other in pairwise(examples):
        if number(example.answer) != number(other.answer) or (
            number(example.answer) is None and example.answer != other.answer
        ):
            assert not any(task.grade(example, text) for text in solutions(other)), (example, other)
