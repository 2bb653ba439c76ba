import json
import re
import sys
from types import SimpleNamespace

import pytest

from slr_core._install import install_command
from slr_core.errors import ConfigError, DataError
from slr_core.tasks import get_task
from slr_core.tasks.base import Example
from slr_core.tasks.sources import fingerprint, load_questions

LINES = [{"question": f"q{i}?", "steps": [], "answer": str(i), "id": i} for i in range(5)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "svamp" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets``: what it was asked for, and the rows that it gives."""
    fake = SimpleNamespace(asked=[], rows=[{"question": "q?", "final_ans": str(i)} for i in range(4)], error=None)

    def load_dataset(*names, split):
        fake.asked.append((*names, split))
        if fake.error:
            raise fake.error
        return fake.rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return fake


def test_a_file(data):
    found = load_questions(get_task("svamp"), data=data)
    assert [e.to_json() for e in found.examples] == LINES
    assert found.source == "svamp/test.jsonl"
    assert load_questions(get_task("svamp"), data=str(data), limit=2).examples == found.examples[:2]
    assert load_questions(get_task("svamp"), data=data, limit=9) == found


def test_a_split_of_the_hub(hub):
    found = load_questions(get_task("multiarith"), split="test")
    assert found.examples == tuple(Example("q?", (), str(i)) for i in range(4))
    assert hub.asked == [("ChilleD/MultiArith", None, "test")]
    assert found.source == "hub: ChilleD/MultiArith, test"
    assert len(load_questions(get_task("multiarith"), split="test", limit=3).examples) == 3
    hub.rows = [{"question": "q?", "answer": "#### 1"}]
    assert load_questions(get_task("gsm8k"), split="train").source == "hub: openai/gsm8k (main), train"
    assert hub.asked[-1] == ("openai/gsm8k", "main", "train")


def test_the_generator():
    found = load_questions(get_task("state_tracking"), generate=4, seed=2, generator_options={"length": "3"})
    stream = get_task("state_tracking").generate(2, length=3)
    assert found.examples == tuple(next(stream) for _ in range(4))
    assert found.source == "generated, seed 2, elements=5, length=3"
    assert load_questions(get_task("state_tracking"), generate=4, seed=2, generator_options={"length": 3}) == found
    assert (
        load_questions(get_task("state_tracking"), generate=4, seed=3, generator_options={"length": 3}).sha256
        != found.sha256
    )


def test_the_fingerprint_is_of_the_questions_and_not_of_the_file(data, tmp_path):
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(json.dumps(dict(reversed(line.items()))) for line in LINES))
    assert load_questions(get_task("svamp"), data=again).sha256 == load_questions(get_task("svamp"), data=data).sha256
    one, other = Example("q", (), "1"), Example("q", (), "2")
    assert len({fingerprint(x) for x in ((one,), (other,), (one, other), (other, one), ())}) == 5
    assert fingerprint((Example("q", (), "1", {"b": 1, "a": 2}),)) == fingerprint(
        (Example("q", (), "1", {"a": 2, "b": 1}),)
    )


def test_exactly_one_source_has_to_be_given(data):
    task = get_task("state_tracking")
    for sources in (
        {},
        {"data": data, "generate": 3},
        {"data": data, "split": "test"},
        {"split": "test", "generate": 3},
    ):
        with pytest.raises(ConfigError, match="exactly one source"):
            load_questions(task, **sources)
    with pytest.raises(ConfigError, match=r"length.*are for generated"):
        load_questions(task, data=data, generator_options={"length": 3})
    for numbers in ({"generate": 0}, {"generate": -1}, {"generate": 3, "limit": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            load_questions(task, **numbers)


def test_unknown_split_lists_splits(hub):
    with pytest.raises(ConfigError, match="gsm8k has no split valid on the hub; it has train, test"):
        load_questions(get_task("gsm8k"), split="valid")
    with pytest.raises(ConfigError, match="it has none: give a file"):
        load_questions(get_task("prosqa"), split="test")
    assert hub.asked == []


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape(install_command("eval"))):
        load_questions(get_task("gsm8k"), split="test")


def test_hub_errors(hub):
    hub.error = ConnectionError("no network")
    with pytest.raises(DataError, match=r"ChilleD/MultiArith, split test: ConnectionError\('no network'\)"):
        load_questions(get_task("multiarith"), split="test")
    hub.error, hub.rows = None, [{"question": "q?"}]
    with pytest.raises(DataError, match="final_ans"):
        load_questions(get_task("multiarith"), split="test")
    hub.rows = [{"problem": "p", "solution": "no box", "level": 1}]
    with pytest.raises(DataError, match="no answer"):
        load_questions(get_task("math"), split="test500")


def test_nothing_to_ask_is_a_data_error(hub, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: no questions"):
        load_questions(get_task("svamp"), data=empty)
    hub.rows = []
    with pytest.raises(DataError, match="no questions"):
        load_questions(get_task("multiarith"), split="test")


def test_empty_question(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"question": " ", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"blank\.jsonl, question 2, task text: the question is empty"):
        load_questions(get_task("text"), data=path)
