"""The graders against a list of outputs that were judged by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from slr_core.tasks import TASKS, get_task
from slr_core.tasks.base import Example

LINES = [json.loads(line) for line in Path(__file__).with_name("graded.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_the_grader_agrees_with_every_line_judged_by_hand(task):
    wrong = []
    for line in LINES:
        if line["task"] == task:
            example = Example(line.get("question", ""), (), line["answer"])
            if get_task(task).grade(example, line["text"]) is not line["right"]:
                wrong.append((line, get_task(task).extract(line["text"])))
    assert wrong == []


def test_the_list_is_long_and_has_both_kinds_for_every_task():
    assert len(LINES) >= 150
    assert len({json.dumps(line, sort_keys=True) for line in LINES}) == len(LINES)
    count = Counter((line["task"], line["right"]) for line in LINES)
    assert all(count[task, right] >= 2 for task in TASKS for right in (True, False))
    assert all(line["note"] for line in LINES)
