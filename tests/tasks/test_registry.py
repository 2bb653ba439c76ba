import json
import subprocess
import sys

import pytest

from slr_core.errors import ConfigError
from slr_core.tasks import TASKS, get
from slr_core.tasks.base import Card, Example, HubSplit, Task

NAMES = ("prosqa prontoqa gsm8k gsm_hard svamp multiarith asdiv math reachability arithmetic state_tracking").split()
GENERATED = ["prosqa", "prontoqa", "reachability", "arithmetic", "state_tracking"]


def take(task, count, seed=0, **dials):
    stream = task.generate(seed, **dials)
    return [next(stream) for _ in range(count)]


def test_every_task_is_found_by_its_name():
    assert list(TASKS) == NAMES
    assert all(get(name) is TASKS[name] and isinstance(get(name), Task) for name in NAMES)


def test_an_unknown_task_is_refused_with_the_names_that_there_are():
    with pytest.raises(ConfigError, match="there is no task prosqua") as refused:
        get("prosqua")
    assert all(name in str(refused.value) for name in NAMES)


def test_a_task_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(type(TASKS["math"]), "needs", ("no_such_module",))
    with pytest.raises(ConfigError, match=r"extra `eval`.*no_such_module"):
        get("math")
    assert get("gsm8k") is TASKS["gsm8k"]


def test_importing_the_tasks_imports_nothing_heavy():
    code = (
        "import json, sys; import slr_core.tasks, slr_core.tasks.sources;"
        "print(json.dumps([m for m in ('torch', 'sympy', 'datasets', 'math_verify', 'numpy', 'transformers')"
        " if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_a_card_that_says_what_matters(name):
    task = get(name)
    card = task.card
    assert isinstance(card, Card)
    assert card.origin
    assert card.licence
    assert card.grading
    assert card.splits or task.dials
    assert all(isinstance(where, HubSplit) for where in task.hub.values())
    assert task.hub or task.dials


@pytest.mark.parametrize("name", GENERATED)
def test_the_shortcuts_on_the_card_are_those_that_are_measured(name):
    task = get(name)
    (example,) = take(task, 1)
    assert task.baselines(example).keys() == task.card.shortcuts.keys()
    assert all(0 <= score <= 1 for score in task.baselines(example).values())


@pytest.mark.parametrize("name", GENERATED)
def test_generated_questions_are_those_of_their_seed_and_graded_right_by_their_answer(name):
    task = get(name)
    examples = take(task, 30, seed=3)
    assert examples == take(task, 30, seed=3)
    assert examples != take(task, 30, seed=4)
    for example in examples:
        assert task.extract(example.answer) == example.answer
        assert task.grade(example, example.answer)
        assert task.grade(example, "\n".join([*example.steps, f"### {example.answer}"]))
        assert not task.grade(example, "")
        assert task.prompt(example) == example.question
        assert json.loads(json.dumps(example.to_json())) == example.to_json()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(GENERATED)))
def test_a_task_without_a_generator_says_so(name):
    with pytest.raises(ConfigError, match=f"{name} cannot generate"):
        get(name).generate(0)


def test_dials_given_as_text_are_read_as_their_kind():
    task = get("reachability")
    as_text = take(task, 5, hops="2", nodes="8", degree="2")
    assert as_text == take(task, 5, hops=2, nodes=8, degree=2.0) == take(task, 5, hops=2, nodes=8, degree=2)
    assert take(get("prontoqa"), 3, balanced="true") == take(get("prontoqa"), 3, balanced=True)
    assert take(get("prontoqa"), 3, balanced="False") == take(get("prontoqa"), 3)
    assert take(get("arithmetic"), 1, operation="multiply") == take(get("arithmetic"), 1, operation="multiply")


@pytest.mark.parametrize(
    ("name", "dials", "named"),
    [
        ("prosqa", {"hops": 3}, "hops.*min_hops"),
        ("prosqa", {"nodes": "many"}, "nodes"),
        ("prosqa", {"nodes": 5}, "nodes"),
        ("prosqa", {"balanced": 1}, "balanced"),
        ("prosqa", {"balanced": "maybe"}, "balanced"),
        ("prontoqa", {"hops": 0}, "hops"),
        ("prontoqa", {"hops": 7}, "1 to 6"),
        ("prontoqa", {"hops": True}, "hops"),
        ("prontoqa", {"hops": 2.0}, "hops"),
        ("reachability", {"hops": 0}, "hops"),
        ("reachability", {"hops": 4, "nodes": 9}, "nodes"),
        ("reachability", {"degree": 0.5}, "degree"),
        ("reachability", {"degree": 5}, "degree"),
        ("arithmetic", {"digits": 0}, "digits"),
        ("arithmetic", {"digits": 101}, "digits"),
        ("arithmetic", {"operation": "divide"}, "add or multiply"),
        ("state_tracking", {"elements": 2}, "elements"),
        ("state_tracking", {"elements": 6}, "elements"),
        ("state_tracking", {"length": 0}, "length"),
    ],
    ids=str,
)
def test_a_dial_that_does_not_exist_or_cannot_be_is_refused_at_once(name, dials, named):
    with pytest.raises(ConfigError, match=named):
        get(name).generate(0, **dials)  # before the first question is asked for


def test_tasks_without_a_public_set_refuse_a_row():
    with pytest.raises(ConfigError, match="prosqa has no public data set"):
        get("prosqa").from_row({"question": "q"})


def test_difficulty_is_what_the_dial_or_the_data_says():
    assert {get("reachability").difficulty(e) for e in take(get("reachability"), 5, hops=3)} == {3}
    assert {get("arithmetic").difficulty(e) for e in take(get("arithmetic"), 5, digits=7)} == {7}
    assert {get("state_tracking").difficulty(e) for e in take(get("state_tracking"), 5, length=6)} == {6}
    assert {get("prontoqa").difficulty(e) for e in take(get("prontoqa"), 5, hops=4)} == {4}
    assert get("gsm8k").difficulty(Example("q", ("a", "b"), "1")) == 2
    levels = [{"level": "Level 5"}, {"level": 3}, {"level": "Level ?"}, {}]
    assert [get("math").difficulty(Example("q", (), "1", extra)) for extra in levels] == [5, 3, 0, 0]


def test_math_is_asked_for_a_box():
    assert get("math").prompt(Example("What is 1 + 1?", (), "2")).startswith("What is 1 + 1?\n")
    assert "\\boxed{}" in get("math").prompt(Example("q", (), "2"))
