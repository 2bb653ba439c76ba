import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slr_core.errors import DataError
from slr_core.tasks.base import Example, read_jsonl

LINE = {"question": "q?", "steps": ["a", "b"], "answer": "c", "edges": [[0, 1]], "id": 7}


def written(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_lines_become_examples_and_extra_fields_are_kept(name, tmp_path):
    path = written(tmp_path, json.dumps(LINE) + "\n\n  \n" + json.dumps({**LINE, "answer": "d"}), name)
    first, second = read_jsonl(path)
    assert first == Example("q?", ("a", "b"), "c", {"edges": [[0, 1]], "id": 7})
    assert second.answer == "d"
    assert read_jsonl(str(path)) == [first, second]
    assert first.to_json() == LINE
    assert list(first.to_json())[:3] == ["question", "steps", "answer"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(LINE), encoding="utf-8-sig")
    assert [example.question for example in read_jsonl(path)] == ["q?"]


@given(st.text(), st.lists(st.text(), max_size=3), st.text(), st.booleans())
def test_writing_back_loses_nothing(tmp_path_factory, question, steps, answer, ascii_only):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    line = {"question": question, "steps": steps, "answer": answer, "extra": [question]}
    path.write_text(json.dumps(line, ensure_ascii=ascii_only) + "\n", encoding="utf-8", newline="\n")
    (example,) = read_jsonl(path)
    assert example.to_json() == line


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(separator, tmp_path):
    # JSON allows these inside strings, unescaped.
    path = written(tmp_path, json.dumps({**LINE, "question": f"a{separator}b"}, ensure_ascii=False) + "\n")
    assert [example.question for example in read_jsonl(path)] == [f"a{separator}b"]


def test_windows_line_ends(tmp_path):
    assert len(read_jsonl(written(tmp_path, (json.dumps(LINE) + "\r\n") * 3))) == 3


def test_steps_may_be_left_out(tmp_path):
    path = written(tmp_path, json.dumps({"question": "q?", "answer": "c", "id": 7}))
    assert read_jsonl(path) == [Example("q?", (), "c", {"id": 7})]


def test_an_empty_file_has_no_examples(tmp_path):
    assert read_jsonl(written(tmp_path, "")) == []


GOOD = json.dumps(LINE) + "\n"
BAD_LINES = {
    "not-json": "{",
    "not-an-object": "[1, 2]",
    "a-number": "3",
    "null": "null",
    "no-question": json.dumps({k: v for k, v in LINE.items() if k != "question"}),
    "no-answer": json.dumps({k: v for k, v in LINE.items() if k != "answer"}),
    "question-a-number": json.dumps({**LINE, "question": 3}),
    "answer-null": json.dumps({**LINE, "answer": None}),
    "steps-a-string": json.dumps({**LINE, "steps": "abc"}),
    "steps-of-numbers": json.dumps({**LINE, "steps": [1, 2]}),
    "question-with-a-surrogate": json.dumps({**LINE, "question": "\ud800 x"}),
    "answer-with-a-surrogate": json.dumps({**LINE, "answer": "x \udc00"}),
    "steps-with-a-surrogate": json.dumps({**LINE, "steps": ["a", "\udfff"]}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case, tmp_path):
    path = written(tmp_path, GOOD * 2 + BAD_LINES[case] + "\n" + GOOD)
    with pytest.raises(DataError, match=r"data\.jsonl, line 3"):
        read_jsonl(path)


def test_a_lone_surrogate_is_refused_and_a_pair_is_a_character(tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: expected Unicode text, got a lone surrogate"):
        read_jsonl(written(tmp_path, '{"question": "\\ud83d", "answer": "\\ude00"}'))
    (example,) = read_jsonl(written(tmp_path, '{"question": "\\ud83d\\ude00", "answer": "x"}'))
    assert example.question == "\U0001f600"


def damaged(raw: bytes) -> bytes:
    return raw[:40] + bytes(255 - x for x in raw[40:60]) + raw[60:]


BAD_FILES = {
    "not-gzip": lambda raw: b"plain text",
    "truncated": lambda raw: raw[:-20],
    "damaged": damaged,
    "wrong-checksum": lambda raw: raw[:-8] + b"\0" * 8,
    "not-utf8": lambda raw: gzip.compress(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file_is_named(case, tmp_path):
    lines = "".join(json.dumps({**LINE, "id": i}) + "\n" for i in range(200))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(BAD_FILES[case](gzip.compress(lines.encode())))
    with pytest.raises(DataError, match=r"data\.jsonl\.gz"):
        read_jsonl(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=tmp_path.name):
        read_jsonl(tmp_path)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"question": "q?"}', "line 1: no field 'answer'; expected"),
        ("word", "line 1: not a JSON object; expected"),
        ("[1]", "line 1: not a JSON object; expected"),
    ],
)
def test_fault_in_plain_words(line, fault, tmp_path):
    with pytest.raises(DataError, match=fault) as caught:
        read_jsonl(written(tmp_path, line))
    assert "Error(" not in str(caught.value)


def test_missing_file_in_plain_words(tmp_path):
    with pytest.raises(DataError) as caught:
        read_jsonl(tmp_path / "nowhere.jsonl")
    assert str(caught.value) == f"cannot read {tmp_path / 'nowhere.jsonl'}: No such file or directory"
