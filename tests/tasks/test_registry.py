import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from slr_core.errors import ConfigError, DataError
from slr_core.tasks import TASKS, get_task, infer_task, registry, resolve_task, task_names
from slr_core.tasks.base import Card, Example, HubSplit, Task
from slr_core.tasks.sources import load_questions

NAMES = (
    "text prosqa prontoqa gsm8k gsm_hard svamp multiarith asdiv math reachability arithmetic modular_arithmetic "
    "state_tracking p_hop word_problems"
).split()
GENERATED = [
    "prosqa",
    "prontoqa",
    "reachability",
    "arithmetic",
    "modular_arithmetic",
    "state_tracking",
    "p_hop",
    "word_problems",
]


def take(task, count, seed=0, **options):
    stream = task.generate(seed, **options)
    return [next(stream) for _ in range(count)]


def test_every_task_is_found_by_its_name():
    assert list(TASKS) == NAMES
    assert all(get_task(name) is TASKS[name] and isinstance(get_task(name), Task) for name in NAMES)


def test_an_unknown_task_is_refused_with_the_names_that_there_are():
    with pytest.raises(ConfigError, match="there is no task prosqua") as refused:
        get_task("prosqua")
    assert all(name in str(refused.value) for name in NAMES)


# -- tasks of one's own ----------------------------------------------------------------------------------


class Parity(Task):
    name = "parity"
    card = Card(origin="here", licence="none", splits={}, grading="parity")

    def extract(self, text):
        return text or None

    def grade(self, example, text):
        return len(text) % 2 == 0


PARITY, NO_TASK = Parity(), object()


@pytest.mark.parametrize("name", ["Parity", "PARITY"])
def test_a_class_or_object_of_a_module(name):
    task = get_task(f"{__name__}:{name}")
    assert isinstance(task, Parity)
    assert task.grade(Example("q", (), ""), "ab")


def test_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_task.py").write_text(
        "from slr_core.tasks.text import TextTask\nclass Mine(TextTask):\n    name = 'mine'\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert get_task("my_own_task:Mine").name == "mine"
    assert sys.path == path
    del sys.modules["my_own_task"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:x", "cannot be loaded.*no_such_module"),
        ("json:no_such_name", "cannot be loaded.*no_such_name"),
        (":x", "cannot be loaded"),
        ("json:dumps", "json:dumps is not a task.*got function"),
        (f"{__name__}:NO_TASK", "is not a task.*got object"),
    ],
)
def test_what_is_no_task_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        get_task(name)


@pytest.fixture
def entries(monkeypatch):
    """Entry points of the group, as an installed package would add them."""
    made = [
        EntryPoint("parity", f"{__name__}:Parity", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_module:x", registry.ENTRY_POINTS),
        EntryPoint("gsm8k", f"{__name__}:Parity", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [e for e in made if e.group == group])


@pytest.mark.usefixtures("entries")
def test_entry_points():
    assert isinstance(get_task("parity"), Parity)
    assert get_task("gsm8k") is TASKS["gsm8k"]
    assert task_names() == [*NAMES, "parity", "broken"]
    with pytest.raises(ConfigError, match=r"broken.*no_such_module"):
        get_task("broken")
    with pytest.raises(ConfigError, match="parity"):
        get_task("none")


# -- the task of a file ----------------------------------------------------------------------------------


def file_of(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PLAIN = {"question": "What is the capital of France?", "answer": "Paris"}


@pytest.mark.parametrize("name", ["prosqa", "reachability"])
def test_a_file_that_tells_its_task(name, tmp_path):
    lines = [example.to_json() for example in take(get_task(name), 3)]
    assert infer_task(file_of(tmp_path, *lines)) is TASKS[name]
    assert resolve_task(None, file_of(tmp_path, *lines)) is TASKS[name]
    with pytest.raises(ConfigError, match="do not tell"):
        infer_task(file_of(tmp_path, *lines, PLAIN))


@pytest.mark.parametrize("lines", [[PLAIN], []])
def test_a_file_that_does_not_tell_its_task(lines, tmp_path):
    with pytest.raises(ConfigError, match=r"questions.jsonl.*name it: text .*text:contains") as refused:
        resolve_task(None, file_of(tmp_path, *lines))
    assert all(name in str(refused.value) for name in NAMES)


def test_a_named_task_comes_before_the_file(tmp_path):
    assert resolve_task("text", file_of(tmp_path, PLAIN)) is TASKS["text"]
    assert resolve_task("svamp", None) is TASKS["svamp"]
    with pytest.raises(ConfigError, match=r"name the task .*: text, prosqa"):
        resolve_task(None, None)
    with pytest.raises(DataError, match="nowhere"):
        resolve_task(None, tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"text", "asdiv", "math"}))
def test_a_file_of_another_task_is_refused_with_its_question_named(name, tmp_path):
    own = [e.to_json() for e in take(get_task(name), 1)] if name in GENERATED else [{**PLAIN, "answer": "18"}]
    with pytest.raises(DataError, match=rf"question 2, task {name}: .*task text"):
        load_questions(get_task(name), data=file_of(tmp_path, *own, PLAIN))
    assert load_questions(get_task("text"), data=file_of(tmp_path, *own, PLAIN)).examples[1].answer == "Paris"


def test_a_word_for_a_number_is_not_graded_as_wrong():
    for name in ("gsm8k", "arithmetic"):
        with pytest.raises(DataError, match=r"'Paris' is not a number.*task text"):
            get_task(name).grade(Example("q", (), "Paris"), "Paris")


# -- what every task has ---------------------------------------------------------------------------------


def test_a_task_whose_package_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(type(TASKS["math"]), "needs", ("no_such_module",))
    with pytest.raises(ConfigError, match=r"extra `eval`.*no_such_module"):
        get_task("math")
    assert get_task("gsm8k") is TASKS["gsm8k"]


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
    task = get_task(name)
    card = task.card
    assert isinstance(card, Card)
    assert card.origin
    assert card.licence
    assert card.grading
    assert card.splits or task.generator_options or name == "text"
    assert all(isinstance(where, HubSplit) for where in task.hub.values())
    assert task.hub or task.generator_options or name == "text"


@pytest.mark.parametrize("name", GENERATED)
def test_the_shortcuts_on_the_card_are_those_that_are_measured(name):
    task = get_task(name)
    (example,) = take(task, 1)
    assert task.baselines(example).keys() == task.card.shortcuts.keys()
    assert all(0 <= score <= 1 for score in task.baselines(example).values())


@pytest.mark.parametrize("name", GENERATED)
def test_generated_questions_follow_seed(name):
    task = get_task(name)
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
        get_task(name).generate(0)


def test_options_given_as_text_are_read_as_their_kind():
    task = get_task("reachability")
    as_text = take(task, 5, hops="2", nodes="8", degree="2")
    assert as_text == take(task, 5, hops=2, nodes=8, degree=2.0) == take(task, 5, hops=2, nodes=8, degree=2)
    assert take(get_task("prontoqa"), 3, balanced="true") == take(get_task("prontoqa"), 3, balanced=True)
    assert take(get_task("prontoqa"), 3, balanced="False") == take(get_task("prontoqa"), 3)
    assert take(get_task("arithmetic"), 1, operation="multiply") == take(
        get_task("arithmetic"), 1, operation="multiply"
    )


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("prosqa", {"hops": 3}, "hops.*min_hops"),
        ("prosqa", {"nodes": "many"}, "nodes"),
        ("prosqa", {"nodes": 5}, "nodes"),
        ("prosqa", {"balanced": 1}, "balanced"),
        ("prosqa", {"balanced": "maybe"}, "balanced"),
        ("prontoqa", {"hops": 0}, "hops"),
        ("prontoqa", {"hops": 9}, "1 to 8"),
        ("prontoqa", {"hops": True}, "hops"),
        ("prontoqa", {"hops": 2.0}, "hops"),
        ("reachability", {"hops": 0}, "hops"),
        ("reachability", {"hops": 4, "nodes": 9}, "nodes"),
        ("reachability", {"degree": 0.5}, "degree"),
        ("reachability", {"degree": 5}, "degree"),
        ("arithmetic", {"digits": 0}, "digits"),
        ("arithmetic", {"digits": 101}, "digits"),
        ("arithmetic", {"operation": "divide"}, "add or multiply"),
        ("modular_arithmetic", {"modulus": 2}, "modulus"),
        ("modular_arithmetic", {"modulus": 1001}, "modulus"),
        ("modular_arithmetic", {"length": 0}, "length"),
        ("state_tracking", {"elements": 2}, "elements"),
        ("state_tracking", {"elements": 6}, "elements"),
        ("state_tracking", {"length": 0}, "length"),
        ("p_hop", {"letters": 1}, "letters"),
        ("p_hop", {"min_hops": 5}, "min_hops"),
        ("p_hop", {"length": 19}, "length"),
        ("word_problems", {"min_steps": 1}, "min_steps"),
        ("word_problems", {"max_steps": 7}, "2 to 6"),
        ("word_problems", {"least": 20}, "least"),
        ("word_problems", {"distractors": -1}, "distractors"),
        ("word_problems", {"steps": "spoken"}, "equations, words or running"),
        ("word_problems", {"templates": "test"}, "train or held_out"),
    ],
    ids=str,
)
def test_wrong_option(name, options, named):
    with pytest.raises(ConfigError, match=named):
        get_task(name).generate(0, **options)  # before the first question is asked for


def test_tasks_without_a_public_set_refuse_a_row():
    with pytest.raises(ConfigError, match="prosqa has no public data set"):
        get_task("prosqa").from_row({"question": "q"})


def test_difficulty_is_what_the_option_or_the_data_says():
    assert {get_task("reachability").difficulty(e) for e in take(get_task("reachability"), 5, hops=3)} == {3}
    assert {get_task("arithmetic").difficulty(e) for e in take(get_task("arithmetic"), 5, digits=7)} == {7}
    assert {get_task("state_tracking").difficulty(e) for e in take(get_task("state_tracking"), 5, length=6)} == {6}
    assert {get_task("prontoqa").difficulty(e) for e in take(get_task("prontoqa"), 5, hops=4)} == {4}
    assert get_task("gsm8k").difficulty(Example("q", ("a", "b"), "1")) == 2
    levels = [{"level": "Level 5"}, {"level": 3}, {"level": "Level ?"}, {}]
    assert [get_task("math").difficulty(Example("q", (), "1", extra)) for extra in levels] == [5, 3, 0, 0]


def test_math_is_asked_for_a_box():
    assert get_task("math").prompt(Example("What is 1 + 1?", (), "2")).startswith("What is 1 + 1?\n")
    assert "\\boxed{}" in get_task("math").prompt(Example("q", (), "2"))
