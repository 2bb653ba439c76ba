import pytest
from hypothesis import given
from hypothesis import strategies as st

from slr_core.errors import ConfigError, DataError
from slr_core.tasks import get_task
from slr_core.tasks.base import Example
from slr_core.tasks.text import TextTask, normalize


def grade(name, answer, text, **extra):
    return get_task(name).grade(Example("q?", (), answer, extra), text)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("Paris", "Paris", True),
        ("Paris", " paris.\n", True),
        ("Paris", "**Paris**", True),
        ("Paris", "The capital is big.\nParis", True),
        ("Paris", "The answer is Paris.", True),
        ("Paris", "It is in France. #### Paris", True),
        ("Paris", "It is in France. It is big. # Paris", True),
        ("Paris", "\\boxed{Paris}", True),
        ("Paris", "The answer is Paris. Wait, it is London.", False),
        ("Paris", "Paris or London", False),
        ("Paris", "London", False),
        ("Paris", "", False),
        ("rorpus", "a rorpus", True),
        ("a", "a", True),
        ("C#", "C#", True),
        ("C#", "C", False),
        ("F(x)", "f(x)", True),
        ("Straße", "STRASSE", True),
        ("don't", "don\u2019t", True),
        ("1000", "1,000", True),
        ("18", "18.0", True),
        (".5", "0.5", True),
        (".5", "5", False),
        ("-5", "5", False),
        ("5", "5 apples", False),
        ("3 million", "3", False),
        ("?", "?", True),
        ("?", "!", False),
    ],
)
def test_exact(answer, text, right):
    assert grade("text", answer, text) is right


@given(st.text(min_size=1).filter(str.strip))
def test_every_answer_equals_itself(answer):
    line = answer.strip().splitlines()[-1].strip()
    assert normalize(line) == normalize(f" {line}\n")
    assert isinstance(grade("text", answer, answer), bool)
    if line.isalnum():
        assert grade("text", line, line)
        assert grade("text:contains", line, f"so {line}, I think")


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("Paris", "I think it is Paris, the capital.", True),
        ("New York", "It is new\nyork.", True),
        ("Paris", "Parisian", False),
        ("5", "It is 5.", True),
        ("5", "It is 3.5", False),
        ("5", "It is 5.3", False),
        ("5", "It is -5", False),
        ("5", "", False),
    ],
)
def test_contains(answer, text, right):
    assert grade("text:contains", answer, text) is right


def test_number():
    assert grade("text:number", "18", "First 3, then 5. The answer is $18.")
    assert not grade("text:number", "18", "17")
    assert get_task("text:number").extract("no digits") is None
    with pytest.raises(DataError, match=r"'Paris' is not a number.*task text"):
        grade("text:number", "Paris", "Paris")


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("B", "B", True),
        ("B", "(b)", True),
        ("b", "B) London", True),
        ("B", "The answer is (B).", True),
        ("B", "The answer is B, London.", True),
        ("B", "I think a good answer is B", True),
        ("B", "A or B", False),
        ("B", "A", False),
        ("B", "I do not know", False),
        ("A", "I ate a cake", False),
        ("B", "", False),
    ],
)
def test_choice_by_label(answer, text, right):
    assert grade("text:choice", answer, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [("London", True), ("B", True), ("It is London.", True), ("Paris or London", False), ("C", False)],
)
@pytest.mark.parametrize("answer", ["London", "B"])
def test_choice_by_text(answer, text, right):
    assert grade("text:choice", answer, text, choices=["Paris", "London", "Rome"]) is right


@pytest.mark.parametrize(("answer", "choices"), [("Oslo", ["Paris", "Rome"]), ("C", ["Paris", "Rome"]), ("Oslo", [])])
def test_a_reference_that_is_no_choice_is_refused(answer, choices):
    with pytest.raises(DataError, match="is not a choice"):
        grade("text:choice", answer, "A", choices=choices)
    with pytest.raises(DataError, match="list of strings"):
        grade("text:choice", "A", "A", choices=[1, 2])


def test_regular_expression():
    task = get_task(r"text:regex=<a>(.*?)</a>")
    assert task.extract("<a>1</a> <a>Paris</a> x") == "Paris"
    assert task.grade(Example("q", (), "Paris"), "<a>London</a> <a>paris</a>")
    assert not task.grade(Example("q", (), "Paris"), "Paris")
    assert get_task(r"text:regex=\d+").extract("1 and 22") == "22"
    with pytest.raises(ConfigError, match="not a regular expression"):
        get_task("text:regex=(")


def test_names_tell_gradings_apart():
    names = ["text", "text:contains", "text:number", "text:choice", r"text:regex=\w:\w"]
    assert [get_task(name).name for name in names] == names
    assert TextTask().name == "text"
    for wrong in ("text:", "text:fuzzy", "text:regex=", "text:exact=3"):
        with pytest.raises(ConfigError, match=r"exact, contains, number, choice, regex=PATTERN"):
            get_task(wrong)


def test_an_empty_reference_answer_is_refused():
    with pytest.raises(DataError, match="empty"):
        grade("text", " ", "x")
