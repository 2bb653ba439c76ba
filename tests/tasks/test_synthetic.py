import math
import re
from itertools import islice
from operator import add, mul
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_core.errors import DataError
from slr_core.tasks import get_task
from slr_core.tasks.base import Example


def take(name, count, seed=0, **options):
    return list(islice(get_task(name).generate(seed, **options), count))


def shortcut(name, rule, count=2000, **options):
    return mean(get_task(name).baselines(e)[rule] for e in take(name, count, **options))


# -- reachability ----------------------------------------------------------------------------------------


def reached(links, source):
    """Everything that links lead to, by matrix powers over sets: not a breadth-first search with distances."""
    found, count = {source}, 0
    while True:
        more = {b for a, b in links if a in found} - found
        if not more:
            return found, count
        found |= more
        count += 1


def shortest(links, source, target):
    found = {source}
    for steps in range(1, len(links) + 1):
        found |= {b for a, b in links if a in found}
        if target in found:
            return steps
    return None


@given(st.integers(1, 5), st.integers(0, 12), st.floats(1, 2.5), st.integers(0, 10**6))
@settings(max_examples=60)
def test_reachability_is_what_its_links_say(hops, more, degree, seed):
    (example,) = take("reachability", 1, seed, hops=hops, nodes=max(12, 2 * (hops + 1)) + more, degree=degree)
    text, _, asked = example.question.partition(" True or false: ")
    links = [(int(a), int(b)) for a, b in re.findall(r"(\d+) to (\d+)\.", text)]
    target, source = map(int, re.findall(r"\d+", asked))
    assert [list(link) for link in links] == example.extra["links"]
    assert len(set(links)) == len(links)
    assert all(a != b for a, b in links)
    assert (target in reached(links, source)[0]) == (example.answer == "True")
    if example.answer == "True":
        assert shortest(links, source, target) == hops == len(example.steps)
        assert str(target) in re.findall(r"\d+", example.steps[-1])[1:]
    else:
        assert len(example.steps) == reached(links, source)[1] >= hops
    levels = [set(map(int, step.partition(": ")[2].rstrip(".").split(", "))) for step in example.steps]
    assert set().union({source}, *levels) <= reached(links, source)[0]
    assert sum(map(len, levels)) == len(set().union(*levels))


def test_reachability_has_the_links_that_its_degree_asks_for():
    assert {len(e.extra["links"]) for e in take("reachability", 50, nodes=16, degree=1.5)} == {24}


def test_reachability_has_no_shortcut():
    examples = take("reachability", 2000)
    assert shortcut("reachability", "always_true") == pytest.approx(0.5, abs=0.035)

    def degree(example, node, end):
        return sum(link[end] == example.extra[node] for link in example.extra["links"])

    for node, end in (("source", 0), ("source", 1), ("target", 0), ("target", 1)):
        by_answer = [mean(degree(e, node, end) for e in examples if e.answer == answer) for answer in ("True", "False")]
        assert by_answer[0] == pytest.approx(by_answer[1], abs=0.15), (node, end)


# -- arithmetic ------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.sampled_from(["add", "multiply"]), st.integers(0, 10**6))
@settings(max_examples=60)
def test_arithmetic_is_exact_and_its_steps_are_true(digits, operation, seed):
    (example,) = take("arithmetic", 1, seed, digits=digits, operation=operation)
    a, sign, b = re.fullmatch(r"What is (\d+) ([+*]) (\d+)\?", example.question).groups()
    assert (len(a), len(b)) == (digits, digits)
    assert sign == {"add": "+", "multiply": "*"}[operation]
    assert int(example.answer) == (int(a) + int(b) if sign == "+" else int(a) * int(b))
    assert len(example.steps) == digits
    terms = [[int(n) for n in re.findall(r"\d+", step)] for step in example.steps]
    if sign == "+":
        assert all(x + y + carry == total for x, y, carry, total in terms)
        carries = [0, *(total // 10 for *_, total in terms)]
        assert [carry for *_, carry, _ in terms] == carries[:-1]
        written = "".join(str(total % 10) for *_, total in terms)[::-1]
        assert int(f"{carries[-1]}{written}") == int(example.answer)
    else:
        assert all(x == int(a) and x * part == product for x, part, product in terms)
        assert sum(product for *_, product in terms) == int(example.answer)


def test_dropping_carries_is_worth_what_the_card_says():
    # A first digit is 1 to 9, so there the share of pairs without a carry is 36/81; elsewhere 55/100.
    for digits in (1, 2, 3):
        expected = (36 / 81) * 0.55 ** (digits - 1)
        assert shortcut("arithmetic", "no_carry", digits=digits) == pytest.approx(expected, abs=0.035)
    assert shortcut("arithmetic", "no_carry", digits=6) < 0.05
    assert shortcut("arithmetic", "no_carry", digits=4, operation="multiply") < 0.01


@pytest.mark.parametrize(
    ("question", "score"),
    [("12 + 34", 1), ("19 + 34", 0), ("91 + 34", 0), ("12 * 34", 0), ("12 * 13", 1), ("20 * 40", 1), ("11 * 55", 0)],
)
def test_the_carry_rule_is_right_where_nothing_is_carried(question, score):
    assert get_task("arithmetic").baselines(Example(f"What is {question}?", (), "")) == {"no_carry": score}


def test_the_baselines_refuse_a_question_of_another_task():
    for name in ("arithmetic", "modular_arithmetic", "state_tracking"):
        with pytest.raises(DataError, match="not a"):
            get_task(name).baselines(Example("Is Tom a lempus?", (), "Tom is a lempus."))


# -- modular arithmetic ----------------------------------------------------------------------------------


@given(st.integers(3, 40), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_residue_is_that_of_the_operations_one_after_the_other(modulus, length, seed):
    (example,) = take("modular_arithmetic", 1, seed, modulus=modulus, length=length)
    start, *operations, asked = example.question.split(". ")
    assert asked == f"What is the result modulo {modulus}?"
    assert len(operations) == len(example.steps) == length == get_task("modular_arithmetic").difficulty(example)
    value = int(start.removeprefix("Start with "))
    for operation, step in zip(operations, example.steps, strict=True):
        name, number = operation.rsplit(" ", 1)
        sign, apply = {"Add": ("+", add), "Multiply by": ("*", mul)}[name]
        after = {x: apply(x, int(number)) % modulus for x in range(modulus)}
        assert set(after.values()) == set(range(modulus)), "an operation forgets where it began"
        assert step == f"{value} {sign} {number} = {after[value]}"
        value = after[value]
    assert example.answer == str(value)


@pytest.mark.parametrize(
    ("ending", "answer", "said"),
    [
        ("What is the result modulo 7?", "7", "not a residue, 0 to 6"),
        ("What is the result modulo 7?", "-1", "not a residue"),
        ("What is the result modulo 7?", "3/2", "not a residue"),
        ("What is the result?", "3", "not a modular-arithmetic question"),
    ],
)
def test_reference_must_be_a_residue(ending, answer, said):
    with pytest.raises(DataError, match=said):
        get_task("modular_arithmetic").check_example(Example(f"Start with 1. Add 2. {ending}", (), answer))


def test_modular_arithmetic_has_no_shortcut():
    for length, start in ((1, 0.07), (2, 0.19), (4, 1 / 7), (8, 1 / 7)):
        assert shortcut("modular_arithmetic", "start", length=length) == pytest.approx(start, abs=0.03)
        assert shortcut("modular_arithmetic", "last", length=length) == pytest.approx(1 / 7, abs=0.03)


# -- state tracking --------------------------------------------------------------------------------------


@given(st.integers(3, 5), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_order_is_that_of_the_permutations_one_after_the_other(elements, length, seed):
    (example,) = take("state_tracking", 1, seed, elements=elements, length=length)
    start, *moves = example.question.removesuffix(" What is the order now?").split(". ")
    row = start.removeprefix("Start with ").split()
    assert row == list("abcde"[:elements])
    assert (len(moves), len(example.steps)) == (length, length)
    for move, step in zip(moves, example.steps, strict=True):
        places = [int(place) for place in re.findall(r"\d", move)]
        assert sorted(places) == list(range(1, elements + 1))
        before = dict(enumerate(row, start=1))
        row = [before[place] for place in places]
        assert step == " ".join(row)
    assert example.answer == " ".join(row)


@pytest.mark.parametrize("elements", [3, 4, 5])
def test_guessing_the_start(elements):
    for length in (1, 5):
        score = shortcut("state_tracking", "identity", elements=elements, length=length)
        assert score == pytest.approx(1 / math.factorial(elements), abs=0.03)


# -- p-hop induction -------------------------------------------------------------------------------------


@given(st.integers(2, 26), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40)
def test_p_hop_goes_to_previous_occurrences(letters, hops, seed):
    (example,) = take("p_hop", 1, seed, letters=letters, length=letters * (hops + 1), min_hops=hops, max_hops=hops)
    row, _, asked = example.question.partition(" ? ")
    row, seen = row.split(), []
    place = len(row) - 1
    for _ in range(int(asked)):
        place = max(i for i in range(place) if row[i] == row[place]) + 1
        seen.append(row[place])
    assert (example.steps, example.answer, int(asked)) == (tuple(seen), seen[-1], hops)
    assert get_task("p_hop").difficulty(example) == hops
    assert get_task("p_hop").grade(example, f"It is {example.answer.upper()}.")
    assert not get_task("p_hop").grade(example, "none of them")


def test_p_hop_shortcuts_are_as_the_card_says():
    for hops, last in ((1, 0.12), (2, 0.36)):
        assert shortcut("p_hop", "last", min_hops=hops, max_hops=hops) == pytest.approx(last, abs=0.04)
    assert shortcut("p_hop", "most_frequent") == pytest.approx(0.21, abs=0.04)
    with pytest.raises(DataError, match="not a p-hop question"):
        get_task("p_hop").check_example(Example("a b c", (), "a"))
