import re
from collections import Counter
from itertools import islice
from operator import add, floordiv, mul, sub
from statistics import mean

import pytest

from slr_core.tasks import get_task
from slr_core.tasks import word_problem_forms as forms

TASK = get_task("word_problems")
SIGNS = {"+": add, "-": sub, "*": mul, "/": floordiv}
WORDS = {"half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}
TWICE = re.compile(r"double|again|twice|two times")


def take(count, seed=0, **options):
    return list(islice(TASK.generate(seed, **options), count))


def equations(example):
    for step in example.extra["eq_steps"]:
        left, sign, right, value = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step).groups()
        yield int(left), sign, int(right), int(value)


@pytest.mark.parametrize("options", [{}, {"templates": "held_out"}, {"least": 21, "most": 60, "distractors": 3}])
def test_steps_follow_from_the_question(options):
    """Every equation is true, its operands are numbers of the question or earlier results, and each result is used."""
    most = options.get("most", 20)
    for example in take(300, **options):
        known = Counter(int(n) for n in re.findall(r"\d+", example.question))
        known.update(WORDS[word] for word in re.findall("|".join(WORDS), example.question))
        known.update(2 for _ in TWICE.findall(example.question))
        results, used = [], set()
        for left, sign, right, value in equations(example):
            assert SIGNS[sign](left, right) == value > 1
            assert sign != "/" or left % right == 0
            assert value <= 10 * most
            assert {left, right} <= known.keys() | set(results)
            used |= {left, right}
            results.append(value)
        assert example.answer == str(results[-1])
        assert 2 <= len(results) == len(example.steps) == TASK.difficulty(example) <= 6
        assert set(results[:-1]) <= used
        assert example.question.endswith(("?", "."))


def test_each_length_is_as_frequent():
    counts = Counter(len(example.steps) for example in take(1000))
    assert set(counts) == {2, 3, 4, 5, 6}
    assert all(count == pytest.approx(200, abs=60) for count in counts.values())


def test_held_out_forms_are_not_trained_on():
    """No sentence, name or thing is on both sides, and a question has words of its own side alone."""
    for held in (forms.NAMES, forms.THINGS, forms.OTHER_THINGS, *forms.SENTENCES.values()):
        assert held.train
        assert held.held_out
        assert not set(held.train) & set(held.held_out)
    names = [set(forms.NAMES.train), set(forms.NAMES.held_out)]
    for own, other, templates in ((*names, "train"), (*reversed(names), "held_out")):
        for example in take(50, templates=templates):
            words = set(re.findall(r"\w+", example.question))
            assert words & own
            assert not words & other


def test_held_out_numbers():
    numbers = [int(n) for e in take(200, least=30, most=60, distractors=0) for n in re.findall(r"\d+", e.question)]
    assert all(2 <= n <= 9 or 30 <= n <= 60 for n in numbers)
    assert any(n > 20 for n in numbers)


def test_steps_in_words_have_the_same_equations():
    for plain, worded in zip(take(50), take(50, steps="words"), strict=True):
        assert (plain.question, plain.answer) == (worded.question, worded.answer)
        for step, sentence in zip(plain.steps, worded.steps, strict=True):
            left, sign, right, value = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", step).groups()
            assert f"{left} {sign} {right} = {value}" in sentence
        assert not any("{" in text for text in (worded.question, *worded.steps))


def test_a_running_calculation_goes_on_from_its_last_result():
    """Read from left to right as a calculator does, or with both operands."""
    short = 0
    for plain, running in zip(take(300), take(300, steps="running"), strict=True):
        assert (plain.question, plain.answer) == (running.question, running.answer)
        value = None
        for step, (left, sign, right, result) in zip(running.steps, equations(plain), strict=True):
            first, second = re.fullmatch(r"(\d*)[-+*/](\d+)", step.partition("=")[0]).groups()
            assert sign in step
            short += not first
            assert SIGNS[sign](int(first) if first else value, int(second)) == result
            assert first or value in (left, right)
            value = result
        assert [step.partition("=")[2] for step in running.steps] == [
            *(str(result) for *_, result in list(equations(plain))[:-1]),
            "",
        ]
    assert short > 600


def test_difficulty_is_the_number_of_steps_however_they_are_written():
    for written in ("equations", "words", "running"):
        example = take(1, min_steps=3, max_steps=3, steps=written)[0]
        assert TASK.difficulty(example) == 3


def test_distractors_are_not_computed_with():
    """Without distractors every number of a question is an operand; with them, many questions have others."""

    def unused(example):
        operands = [n for left, _, right, _ in equations(example) for n in (left, right)]
        return set(map(int, re.findall(r"\d+", example.question))) - set(operands)

    assert not any(unused(example) for example in take(200, distractors=0))
    assert sum(bool(unused(example)) for example in take(200, distractors=2)) > 80


def test_the_difference_needs_the_start():
    """The difference between two people is not asked for where it is a number of the question."""
    for example in take(400, min_steps=2, max_steps=2):
        if "How many more" in example.question or "How many fewer" in example.question:
            assert any(word in example.question for word in ("times", "For each", *WORDS)), example.question


def test_no_shortcut():
    assert mean(TASK.baselines(e)["sum"] for e in take(500, max_steps=2)) < 0.06
    assert max(Counter(e.answer for e in take(500)).values()) < 50
