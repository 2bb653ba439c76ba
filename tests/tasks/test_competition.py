import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing import active_children

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("math_verify")

from slr_core.errors import ConfigError, DataError
from slr_core.tasks import equivalence, get_task
from slr_core.tasks.base import Example, read_jsonl
from slr_core.tasks.competition import same, sentences, tidied
from slr_core.tasks.equivalence import Comparer, equivalent

ENDLESS = "9^{9^{9^{9}}}"


@pytest.fixture
def comparer():
    made = Comparer(timeout_s=20)
    yield made
    made.close()


@pytest.fixture
def children():
    """Gives the child processes that the test has started and that still run."""
    before = set(active_children())
    return lambda: set(active_children()) - before


# -- comparing -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_takes_forever_is_ended_and_the_next_comparison_works(comparer, children):
    assert comparer.equal("2", "\\frac{4}{2}")
    (child,) = children()
    comparer.timeout_s = 0.5
    assert not comparer.equal("1", ENDLESS)
    assert not child.is_alive()
    comparer.timeout_s = 20
    assert comparer.equal("\\sqrt{8}", "2\\sqrt{2}")


def test_a_child_that_died_is_started_again(comparer, children):
    assert comparer.equal("1", "1.0")
    (child,) = children()
    child.kill()
    child.join()
    assert comparer.equal("1", "1.0")


@pytest.mark.slow
def test_a_comparison_that_dies_is_unequal_and_the_next_one_works(comparer, children):
    assert comparer.equal("1", "1.0")
    (child,) = children()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(comparer.equal, "1", ENDLESS)
        time.sleep(0.5)
        child.kill()
        assert found.result(20) is False
    assert comparer.equal("1", "1.0")


def test_comparing_works_from_many_threads(comparer):
    pairs = [(f"\\frac{{{n}}}{{2}}", str(m / 2)) for n in range(6) for m in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda pair: comparer.equal(*pair), pairs))
    assert found == [n == m for n in range(6) for m in range(6)]


def test_closing_ends_the_child_and_may_be_repeated(comparer, children):
    assert comparer.equal("1", "1")
    comparer.close()
    comparer.close()
    assert not children()


@pytest.mark.parametrize("name", ["math_verify", "pebble"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setattr(equivalence, "find_spec", lambda wanted: None if wanted == name else wanted)
    with pytest.raises(ConfigError, match=f"extra `eval`.*{name}"):
        Comparer().equal("1", "2")


def broken():
    raise SystemExit(1)


def test_child_that_cannot_start(monkeypatch, comparer, children):
    monkeypatch.setattr(equivalence, "set_up_worker", broken)
    with pytest.raises(ConfigError, match="does not start"):
        comparer.equal("1", "2")
    assert not children()


def test_too_long_an_answer_is_wrong_without_asking(comparer, children):
    assert not comparer.equal("1", "1" * 2000)
    assert not children()


@given(
    st.lists(st.sampled_from(["\\frac", "{", "}", "\\sqrt", "1", "x", "^", "_", "\\", "$", "(", ",", "\n", "é", "\0"]))
)
def test_no_latex_however_broken_raises(parts):
    text = "".join(parts)
    assert same("\\frac{1}{3}", text) is False
    assert isinstance(get_task("math").grade(Example("q", (), "\\frac{1}{3}"), text), bool)


REPEATING = ["0.\\overline{3}", "0.\\bar{3}", "0.\\bar3", "0.\\dot{3}", "0.(3)", "0.3\u0305"]


@pytest.mark.parametrize("text", REPEATING)
def test_repeating_decimals_are_exact(text):
    assert same("\\frac{1}{3}", text)
    assert same(text, "\\frac13")
    assert same(f"-2{text[1:]}", "-\\frac{7}{3}")
    assert same(f"({text}, 1)", "(\\frac13, 1)")
    for other in ("0", "0.3", "3", "\\frac{1}{30}"):
        assert not same(text, other)
        assert not same(other, text)


# -- tidying and extraction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\\left( 3, \\frac12 \\right)", "(3,\\frac{1}{2})"),
        ("\\dfrac{\\sqrt2}{3}", "\\frac{\\sqrt{2}}{3}"),
        ("\\frac1{72}", "\\frac{1}{72}"),
        ("\\frac{35}2", "\\frac{35}{2}"),
        ("x = .5", "0.5"),
        ("f(x)=x+1", "x+1"),
        ("1,234,567", "1234567"),
        ("11,\\! 111", "11111"),
        ("32{,}348", "32348"),
        ("(1,234)", "(1,234)"),
        ("2, 100", "2,100"),
        ("5\\text{ cm}^2", "5"),
        ("3\\sqrt{2}\\mbox{ inches}", "3\\sqrt{2}"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2, 3, \\text{ and } 4", "2,3,4"),
    ],
)
def test_dress_is_taken_off(answer, expected):
    assert tidied(answer) == expected


@given(st.text(alphabet="\\frac{}12 ,x=()textcm^$.%", max_size=25))
def test_tidying_never_raises(text):
    assert isinstance(tidied(text), str)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\text{a } \\boxed{5}}", "5"),
        ("$$x = 3$$", "x = 3"),
        ("\\[ x = 3 \\]", "x = 3"),
        ("first $x=1$, then \\(x=2\\)", "x=2"),
        ("It costs \\$5.", "5"),
        ("Therefore the result is 12 inches.", "12"),
        ("x^2 + 1", "x^2 + 1"),
        ("steps\n\\frac{1}{2}.", "\\frac{1}{2}"),
        ("Final answer: $\\pi$", "\\pi"),
        ("\\boxed", None),
        ("\\boxed{ }", None),
        ("$\\frac{1}{2}$ and \\boxed{3", None),
        (" \n ", None),
    ],
)
def test_the_answer_is_found(text, answer):
    assert get_task("math").extract(text) == answer


def test_a_full_stop_in_a_formula_ends_no_step():
    assert sentences("Let $x = 1. y$ be. Then\nit is \\$2.50 so. End") == (
        "Let $x = 1. y$ be.",
        "Then\nit is \\$2.50 so.",
        "End",
    )


def test_rows_of_both_public_sets_become_examples():
    task = get_task("math")
    row = {"problem": "p?", "level": "Level 3", "type": "Algebra", "solution": "So. It is $\\boxed{\\frac{1}{2}}$."}
    example = task.from_row(row)
    assert (example.question, example.answer) == ("p?", "\\frac{1}{2}")
    assert example.steps == ("So.", "It is $\\boxed{\\frac{1}{2}}$.")
    assert example.extra == {"solution": row["solution"], "level": "Level 3", "type": "Algebra"}
    assert task.difficulty(example) == 3

    row500 = {"problem": "p?", "level": 4, "subject": "Algebra", "solution": "s", "answer": "7", "unique_id": "a/1"}
    example = task.from_row(row500)
    assert (example.answer, task.difficulty(example)) == ("7", 4)
    assert example.extra == {"solution": "s", "level": 4, "type": "Algebra", "unique_id": "a/1"}

    for solution in ("no box", "an empty one: \\boxed{}"):
        with pytest.raises(DataError, match="no answer"):
            task.from_row(row | {"solution": solution})


# -- gold solutions through the reader -------------------------------------------------------------------


def misread(examples):
    task = get_task("math")
    return [i for i, e in enumerate(examples) if not task.grade(e, e.extra["solution"])]


@pytest.mark.parametrize("file", ["train", "test", "test500"])
def test_a_sample_of_gold_solutions_is_graded_right(file, shared_data):
    examples = read_jsonl(shared_data / "math" / f"{file}.jsonl.gz")
    assert misread(examples[:: len(examples) // 300 + 1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train", "test", "test500"])
def test_every_gold_solution_is_graded_right(file, shared_data):
    assert misread(read_jsonl(shared_data / "math" / f"{file}.jsonl.gz")) == []


# Where the source's own normalised answer is broken or says less (units half removed, words or "p.m." deleted,
# rows of a matrix joined), by line from 0. They are right to be graded wrong.
BROKEN = {
    "train": {38, 409, 4371, 4571, 4688, 4715, 5125, 5444, 5699, 6625, 6755, 6809, 7050, 7151, 7230, 7299, 7447, 7456},
    "test": {429, 526, 644, 1714, 1863, 1901, 1958, 1991, 3526, 3647, 3655, 4060, 4134, 4672, 4943},
}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train", "test"])
def test_answers_as_another_normaliser_wrote_them_are_graded_right(file, shared_data):
    examples = read_jsonl(shared_data / "math" / f"{file}.jsonl.gz")
    wrong = {i for i, e in enumerate(examples) if not get_task("math").grade(e, f"\\boxed{{{e.extra['answer_norm']}}}")}
    assert wrong == BROKEN[file]


@pytest.mark.slow
def test_the_answers_of_other_problems_are_graded_wrong(shared_data):
    examples = read_jsonl(shared_data / "math" / "test500.jsonl.gz")[::2]
    task = get_task("math")
    for example, other in pairwise(examples):
        if tidied(example.answer) != tidied(other.answer):
            assert not task.grade(example, other.extra["solution"]), (example.answer, other.answer)


def test_math_verify_holds_an_answer_for_equal_to_itself(shared_data):
    # Through the child, without the comparison as written that comes first.
    examples = read_jsonl(shared_data / "math" / "test500.jsonl.gz")[::10]
    assert [e.answer for e in examples if not equivalent(e.answer, e.answer)] == []
