"""``/grade``: the rule of each task, as the task applies it."""

import asyncio
import threading
import time

import httpx
import pytest

from slr_core.tasks import TASKS
from slr_core.tasks.base import Example
from slr_server.app import create_app
from slr_server.overload import MAX_GRADINGS
from slr_server.protocol.grade import GradeResponse
from slr_server.routes import grade
from slr_server.settings import ServerSettings
from tests.server.asgi import Caller

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

    def slow(body, given_up):
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


QUESTION = {"questions": [{"question": "w", "answer": "w"}] * 2, "texts": ["w"] * 2}


def status(caller):
    return next(message["status"] for message in caller.sent if message["type"] == "http.response.start")


def run_with_held_grader(engine, monkeypatch, scenario, **settings):
    """Run a scenario while the first text that is graded takes until ``gate`` is set; ``graded`` lists all texts."""
    gate, graded = threading.Event(), []

    def hold(task, example, text):
        graded.append(text)
        gate.wait(10)
        return True

    async def run():
        app = create_app(ServerSettings(**settings), engine)
        async with app.router.lifespan_context(app):
            await scenario(app, gate, graded)

    monkeypatch.setattr(type(TASKS["text"]), "grade", hold)
    asyncio.run(run())


async def begin(app, graded):
    caller = Caller(app, "/grade", QUESTION)
    task = asyncio.create_task(caller.call())
    async with asyncio.timeout(10):
        while not graded:
            await asyncio.sleep(0.001)
    return caller, task


def test_disconnected_clients_are_not_graded(engine, monkeypatch):
    async def scenario(app, gate, graded):
        callers = [(await begin(app, graded))]
        waiting = [Caller(app, "/grade", QUESTION) for _ in range(3)]
        callers += [(caller, asyncio.create_task(caller.call())) for caller in waiting]
        await asyncio.sleep(0.01)
        for caller, _ in callers:
            caller.leave()
        await asyncio.wait_for(asyncio.gather(*(task for _, task in callers)), 10)
        gate.set()
        last = Caller(app, "/grade", QUESTION)
        await last.call()
        assert status(last) == 200
        assert len(graded) == 3  # one text of the first client, which was being graded, and those of the last

    run_with_held_grader(engine, monkeypatch, scenario)


def test_grading_is_refused_beyond_its_limit(engine, monkeypatch):
    async def scenario(app, gate, graded):
        tasks = [(await begin(app, graded))[1]]
        tasks += [asyncio.create_task(Caller(app, "/grade", QUESTION).call()) for _ in range(MAX_GRADINGS - 1)]
        await asyncio.sleep(0.05)
        refused = Caller(app, "/grade", QUESTION)
        await refused.call()
        assert (status(refused), "try again later" in refused.text) == (429, True)
        gate.set()
        await asyncio.gather(*tasks)

    run_with_held_grader(engine, monkeypatch, scenario)


def test_time_limit_of_grading(engine, monkeypatch):
    async def scenario(app, gate, graded):
        caller, task = await begin(app, graded)
        await asyncio.wait_for(task, 10)
        gate.set()
        assert status(caller) == 504

    run_with_held_grader(engine, monkeypatch, scenario, request_timeout_s=0.05)
