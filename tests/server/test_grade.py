"""``/grade``: the rule of each task, as the task applies it."""

import asyncio
import time

import httpx
import pytest

from slr_core.tasks import TASKS
from slr_core.tasks.base import Example
from slr_server.protocol.grade import GradeResponse
from slr_server.routes import grade

TEXTS = ("True", "Max is a gorpus.", "max is a gorpus", "So 6 * 7 = 42. #### 42", "The answer is 42.0 apples", "", "B")
EXAMPLES = (
    ("gsm8k", {"question": "6 * 7?", "answer": "42"}),
    ("prontoqa", {"question": "True or false: Max is small.", "answer": "True"}),
    ("prosqa", {"question": "Is Max a gorpus or rompus?", "answer": "Max is a gorpus."}),
    ("text", {"question": "Who?", "answer": "Max is a gorpus"}),
)


@pytest.mark.parametrize(("task", "question"), EXAMPLES)
def test_rule_of_the_task(shared_client, task, question):
    body = {"task": task, "questions": [question] * len(TEXTS), "texts": TEXTS}
    answer = shared_client.post("/grade", json=body).json()
    example = Example(question["question"], (), question["answer"])
    expected = [TASKS[task].grade(example, text) for text in TEXTS]
    assert answer == {"task": task, "correct": expected}
    assert {True, False} == set(expected)


def test_task_is_inferred(shared_client):
    graph = {"idx_to_symbol": [], "edges": [], "root": 0, "target": 1, "neg_target": 2}
    question = {"question": "Is Max a gorpus or rompus?", "answer": "Max is a gorpus.", "steps": []}
    for fields, task in ((graph, "prosqa"), ({}, "text")):
        body = {"questions": [{**question, **fields}], "texts": ["Max is a gorpus."]}
        assert shared_client.post("/grade", json=body).json() == {"task": task, "correct": [True]}


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"texts": []}, "texts"),
        ({"task": "os:system"}, "task"),
        ({"task": "math"}, "task"),
        ({"task": "gsm8k", "questions": [{"question": "w", "answer": "no number"}]}, "questions"),
        ({"questions": []}, "questions"),
    ],
)
def test_refusals(shared_client, changed, param):
    response = shared_client.post("/grade", json={"questions": [EXAMPLES[0][1]], "texts": ["1"], **changed})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_requests_are_graded_one_at_a_time(shared_client, monkeypatch):
    running, most = 0, 0

    def slow(body):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return GradeResponse(task="text", correct=[True])

    monkeypatch.setattr(grade, "_grade", slow)
    body = {"questions": [{"question": "w", "answer": "w"}], "texts": ["w"]}
    app = shared_client.app

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*(client.post("/grade", json=body) for _ in range(3)))

    assert {response.status_code for response in asyncio.run(ask())} == {200}
    assert most == 1
