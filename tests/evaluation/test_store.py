"""The results file: nothing that was kept is lost, nothing that is somebody else's is touched."""

import json
from concurrent.futures import ThreadPoolExecutor
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

from slr_core.errors import DataError
from slr_core.evaluation.store import MethodRun, Store
from tests.evaluation.asked import outcome, spec

KEPT = [outcome("0:a"), outcome("1:b", correct=False, answer=None)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "results.jsonl"


@pytest.fixture
def filled(path):
    """A results file of one finished run."""
    store = Store(path)
    run = store.open(spec(), {"command": "slr eval"})
    for kept in KEPT:
        store.add(run, kept)
    return path


def test_what_was_kept_is_there_again(filled):
    (run,) = Store(filled).runs.values()
    assert (run.spec, run.about) == (spec(), {"command": "slr eval"})
    assert run.outcomes == {kept.key: kept for kept in KEPT}


def test_every_outcome_is_on_disk_at_once(path):
    store = Store(path)
    run = store.open(spec())
    for count, kept in enumerate(KEPT, start=1):
        store.add(run, kept)
        assert len(Store(path).runs[run.id].outcomes) == count


def test_equal_specs_share_a_run(filled):
    before = filled.read_bytes()
    run = Store(filled).open(dict(reversed(spec().items())), {"command": "another"})
    assert len(run.outcomes) == 2
    assert run.about == {"command": "slr eval"}
    assert filled.read_bytes() == before


@pytest.mark.parametrize("field", spec())
def test_any_changed_field_is_another_run(filled, field):
    changed = spec(**{field: {"name": "other"}})
    store = Store(filled)
    assert store.open(changed).outcomes == {}
    store.add(store.open(changed), outcome("0:a", text="of the other"))
    again = Store(filled)
    assert len(again.runs) == 2
    assert again.open(spec()).outcomes["0:a"] == KEPT[0]


def test_a_nested_change_is_another_run():
    runs = [MethodRun(spec(settings={"loop": {"max_iterations": n}, "seed": 0})) for n in (3, 4, 3)]
    assert runs[0].id != runs[1].id
    assert runs[0].id == runs[2].id


def test_run_of_two_processes(path):
    first, second = Store(path), Store(path)
    runs = [store.open(spec()) for store in (first, second)]
    first.add(runs[0], KEPT[0])
    second.add(runs[1], KEPT[1])
    lines = path.read_text().splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["run", "run", "of", "of"]
    path.write_text("\n".join([lines[0], lines[2], lines[1], lines[3]]) + "\n")
    assert len(Store(path).runs[runs[0].id].outcomes) == 2


def test_two_processes_that_continue_a_line_cut_short_lose_nothing(filled):
    whole = filled.read_bytes()
    filled.write_bytes(whole[:-9])
    first, second = Store(filled), Store(filled)
    first.add(first.open(spec()), KEPT[1])
    assert filled.read_bytes() == whole
    for store, key in ((second, "2:c"), (first, "3:d"), (second, "4:e")):
        store.add(store.open(spec()), outcome(key))
    assert list(Store(filled).open(spec()).outcomes) == ["0:a", "1:b", "2:c", "3:d", "4:e"]


def test_a_line_that_another_process_leaves_incomplete_is_cut_off(filled):
    store, whole = Store(filled), filled.read_bytes()
    filled.write_bytes(whole + b'{"of": "')
    store.add(store.open(spec()), outcome("2:c"))
    assert filled.read_bytes().startswith(whole)
    assert list(Store(filled).open(spec()).outcomes) == ["0:a", "1:b", "2:c"]


def test_a_file_that_has_become_another_is_left_alone(filled):
    store = Store(filled)
    filled.write_bytes(b"hello")
    with pytest.raises(DataError, match=rf"{filled}: not a results file"):
        store.add(store.open(spec()), outcome("2:c"))
    assert filled.read_bytes() == b"hello"


def test_a_line_that_is_being_written_is_waited_for(filled):
    store, whole = Store(filled), filled.read_bytes()
    with ThreadPoolExecutor() as pool, filled.open("ab") as other:
        flock(other, LOCK_EX)
        other.write(b'{"of": "')
        other.flush()
        waiting = pool.submit(store.add, store.open(spec()), outcome("2:c"))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        assert filled.read_bytes() == whole + b'{"of": "'
        other.write(
            next(iter(store.runs)).encode() + b'", ' + json.dumps(outcome("3:d").to_json()).encode()[1:] + b"\n"
        )
        other.close()
        waiting.result(timeout=10)
    assert list(Store(filled).open(spec()).outcomes) == ["0:a", "1:b", "3:d", "2:c"]


@pytest.mark.parametrize("left", [1, 9, 60, -1])
def test_a_line_cut_short_is_dropped_and_replaced(filled, left):
    whole = filled.read_bytes()
    *lines, last, end = whole.split(b"\n")
    assert end == b""
    filled.write_bytes(b"\n".join([*lines, last[:left]]))
    torn = filled.read_bytes()
    store = Store(filled)
    run = store.open(spec())
    assert list(run.outcomes) == ["0:a"]
    assert filled.read_bytes() == torn, "a reader changes nothing"
    store.add(run, KEPT[1])
    assert filled.read_bytes() == whole
    store.add(run, outcome("2:c"))
    assert list(Store(filled).open(spec()).outcomes) == ["0:a", "1:b", "2:c"]


def test_a_file_cut_short_in_its_first_line_starts_over(filled):
    first = filled.read_bytes().split(b"\n")[0]
    filled.write_bytes(first[:-5])
    store = Store(filled)
    assert store.runs == {}
    store.open(spec(), {"command": "slr eval"})
    assert filled.read_bytes() == first + b"\n"


def test_an_empty_file_is_an_empty_store(tmp_path):
    path = tmp_path / "results.jsonl"
    path.touch()
    assert Store(path).runs == {}


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store()
    store.add(store.open(spec()), KEPT[0])
    store.save_figure("stability", spec(), {"a": 1}, {})
    assert len(store.figures) == len(store.runs) == 1
    assert list(tmp_path.iterdir()) == []


def test_figure_replaces_earlier(path):
    store = Store(path)
    for kind, of, data in (
        ("stability", spec(), {"n": 1}),
        ("missing", spec(), {"n": 2}),
        ("stability", spec(task="other"), {"n": 3}),
        ("stability", spec(), {"n": 4}),
    ):
        store.save_figure(kind, of, data, {"command": f"slr {data['n']}"})
    for seen in (store, Store(path)):
        assert [(figure.kind, figure.data["n"], figure.about) for figure in seen.figures] == [
            ("missing", 2, {"command": "slr 2"}),
            ("stability", 3, {"command": "slr 3"}),
            ("stability", 4, {"command": "slr 4"}),
        ]


RUN = json.dumps({"run": "x", "spec": {}, "about": {}}).encode()
GARBAGE = {
    "text": b"hello\n",
    "text without an end": b"hello",
    "json without an end": b'{"overall": {"accuracy": 1.0}}',
    "number": b"5\n",
    "list": b"[1]\n",
    "null": b"null\n",
    "pretty": b'{\n  "run": "x"\n}\n',
    "binary": b"\xff\xfe\x00\n",
    "blank line": RUN + b"\n\n" + RUN + b"\n",
    "outcome of no run": json.dumps({"of": "x", **outcome().to_json()}).encode() + b"\n",
    "outcome without its fields": RUN + b'\n{"of": "x", "key": "0:a"}\n',
    "outcome with a text for a number": RUN
    + json.dumps({"of": "x", **outcome(seconds="x").to_json()}).encode()
    + b"\n",
    "outcome of a wrong type": RUN + json.dumps({"of": "x", **outcome(relative_change=5).to_json()}).encode() + b"\n",
    "run without a spec": b'{"run": "x", "about": {}}\n',
    "spec of a wrong type": b'{"run": "x", "spec": 5, "about": {}}\n',
    "figure of a wrong type": b'{"figure": "stability", "spec": {}, "data": [], "about": {}}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_what_is_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        Store(path)
    assert path.read_bytes() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        Store(tmp_path)


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/results.jsonl", tmp_path / ("n" * 300), Path("/proc/results.jsonl")):
        with pytest.raises(DataError, match=rf"{path}: the results cannot be written"):
            Store(path)
        assert Store(path, read_only=True).runs == {}
    Store(tmp_path / "new/results.jsonl")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_that_can_no_longer_be_written_is_named(filled):
    store = Store(filled)
    filled.unlink()
    filled.mkdir()
    with pytest.raises(DataError, match=rf"{filled}: the results cannot be written"):
        store.open(spec("cot"))
