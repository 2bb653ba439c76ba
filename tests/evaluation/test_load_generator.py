"""Load against a server that answers by a script, in this process's own event loop."""

import asyncio
import json
from contextlib import asynccontextmanager
from itertools import islice

import pytest

from slr_core.errors import ConfigError, EngineError
from slr_core.evaluation import load_generator as load
from slr_core.evaluation.load_generator import LoadPlan, LoadReport, RequestOutcome, quantile
from slr_core.tasks.prosqa import ProsQA
from slr_core.tasks.state_tracking import StateTracking
from tests.evaluation.asked import Words, examples


@asynccontextmanager
async def server(answer, starting=()):
    """Answers every POST with what ``answer(number, body, headers)`` gives, a status and a body.

    Its checks of health answer with the statuses of ``starting``, one after another, then with 200.
    """
    seen, statuses = [], list(starting)

    async def handle(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if ": " in line)
            headers = {name.lower(): value for name, value in fields.items()}
            if head.startswith(b"GET /startupz"):
                status, reply = statuses.pop(0) if statuses else 200, {"error": {"message": "loading"}}
            else:
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                seen.append(body)
                status, reply = answer(len(seen), body, headers)
            content = json.dumps(reply).encode()
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)

    async def quietly(reader, writer):
        try:
            await handle(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    made = await asyncio.start_server(quietly, "127.0.0.1", 0)
    async with made:
        yield f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}", seen


def good(iterations=4):
    return 200, {"results": [{"text": "nothing", "iterations": iterations, "exit_reason": "converged"}]}


def under(answer, starting=(), **plan):
    async def ask():
        async with server(answer, starting) as (url, seen):
            return await load.run_load(LoadPlan(url, **plan)), seen

    return asyncio.run(ask())


def test_a_closed_load_asks_questions_of_every_difficulty():
    report, seen = under(lambda *_: good(), duration_s=0.3, concurrency=3)
    assert len(report.requests) == len(seen) == len(report.answered) > 3
    assert {request.difficulty for request in report.requests} == {2, 3, 4}
    assert all(body.keys() == {"prompt"} and " Is " in body["prompt"] for body in seen)
    assert len({body["prompt"] for body in seen}) == len(seen)


def test_open_load_follows_seed():
    counts = [len(under(lambda *_: good(), duration_s=0.4, rate=60.0, seed=7)[1]) for _ in range(2)]
    assert counts[0] == counts[1]
    assert 10 < counts[0] < 45, "a mean of 24"


def test_what_is_refused_or_broken_is_counted_as_that():
    script = [good(), (429, {}), (503, {}), (200, {"results": []}), (200, [])]
    report, _ = under(lambda number, *_: script[number % len(script)], duration_s=0.3, concurrency=1)
    outcomes = report.to_json()["outcomes"]
    assert outcomes.keys() == {"200", "429", "503", "no answer"}
    assert outcomes["200"] == len(report.answered)
    assert abs(outcomes["no answer"] - 2 * outcomes["429"]) <= 2


def test_server_that_is_starting(monkeypatch):
    """Nothing is sent until the model is loaded, or the time to wait is over."""
    monkeypatch.setattr(load, "POLL_S", 0.01)
    report, _ = under(lambda *_: good(), starting=[503, 503, 503], duration_s=0.1, concurrency=1)
    assert report.to_json()["outcomes"].keys() == {"200"}
    with pytest.raises(EngineError, match=r"not started after 0.05 s \(503, loading\)"):
        under(lambda *_: good(), starting=[503] * 1000, duration_s=0.1, timeout_s=0.05)


def test_the_key_is_sent():
    report, _ = under(
        lambda number, body, headers: good() if headers.get("authorization") == "Bearer k" else (401, {}),
        duration_s=0.1,
        api_key="k",
    )
    assert report.to_json()["outcomes"].keys() == {"200"}


def test_a_server_that_is_not_there():
    with pytest.raises(EngineError, match="cannot be reached"):
        asyncio.run(load.run_load(LoadPlan("http://127.0.0.1:9", duration_s=0.1)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "localhost:8000"},
        {"url": "http://x:y"},
        {"duration_s": 0},
        {"concurrency": 0},
        {"rate": 0.0},
        {"hops": ()},
        {"timeout_s": -1},
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        LoadPlan(**{"url": "http://x", **wrong})


def test_questions_have_the_hops_that_they_say():
    task = ProsQA()
    plan = LoadPlan("http://x", hops=(1, 5), seed=3)
    drawn = list(islice(plan.questions(), 12))
    assert {task.difficulty(example) for example in drawn} == {1, 5}
    assert drawn == list(islice(plan.questions(), 12))


def test_own_questions_are_repeated_and_graded_by_their_task():
    plan = {"task": Words(), "examples": examples(3), "seed": 2}
    drawn = [example.question for example in islice(LoadPlan("http://x", **plan).questions(), 12)]
    asked = [example.question for example in plan["examples"]]
    assert [sorted(drawn[i : i + 3]) for i in (0, 3, 6, 9)] == [sorted(asked)] * 4
    assert drawn[:3] != drawn[3:6] or drawn[3:6] != drawn[6:9]
    report, seen = under(lambda *_: good(), duration_s=0.3, concurrency=1, **plan)
    assert {body["prompt"] for body in seen} == set(asked)
    assert {request.difficulty for request in report.requests} == {1, 2, 3}
    by_question = {e.question: Words().grade(e, "nothing") for e in plan["examples"]}
    assert [r.correct for r in report.requests] == [by_question[body["prompt"]] for body in seen]


def test_generated_questions_of_another_task():
    drawn = list(islice(LoadPlan("http://x", task=StateTracking(), seed=1).questions(), 3))
    assert drawn == list(islice(StateTracking().generate(1), 3))
    with pytest.raises(ConfigError):
        next(LoadPlan("http://x", task=Words()).questions())


def test_a_report_adds_up():
    asked = [
        *(
            RequestOutcome(2, "200", n / 100, iterations=4, exit_reason="converged", correct=n % 2 == 0)
            for n in range(1, 100)
        ),
        RequestOutcome(3, "200", 5.0, iterations=6, exit_reason="diverged", correct=True),
        RequestOutcome(3, "429", 0.001),
    ]
    assert LoadReport(10.0, asked).to_json() == {
        "elapsed_s": 10.0,
        "requests": 101,
        "outcomes": {"200": 100, "429": 1},
        "answers_per_s": 10.0,
        "latency_s": {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 5.0},
        "iterations": {"4": 99, "6": 1},
        "exit_reasons": {"converged": 99, "diverged": 1},
        "by_difficulty": {
            "2": {"answers": 99, "iterations": 4.0, "accuracy": 49 / 99, "p50_s": 0.5},
            "3": {"answers": 1, "iterations": 6.0, "accuracy": 1.0, "p50_s": 5.0},
        },
    }


def test_quantiles():
    assert quantile([], 0.5) is None
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.25, 0.5, 0.75, 0.99, 1.0)] == [1.0, 2.0, 3.0, 4.0, 4.0]


@pytest.fixture
def plans(monkeypatch):
    """The plans that the command makes; nothing is sent."""
    made = []

    async def pretend(plan, progress):
        made.append(plan)
        progress(1.0, REPORT.requests[0])
        return REPORT

    monkeypatch.setattr(load, "run_load", pretend)
    return made


REPORT = LoadReport(2.0, [RequestOutcome(2, "200", 0.25, iterations=4, exit_reason="converged", correct=True)])


def test_command(run, plans):
    code, out, _ = run("load", "http://x", "--duration", "2", "--rate", "5", "--hops", "2", "--hops", "6")
    assert code == 0
    assert (plans[0].duration_s, plans[0].rate, plans[0].hops, plans[0].examples) == (2.0, 5.0, [2, 6], ())
    assert plans[0].task.name == "prosqa"
    assert "1 requests in 2.0 s (1 200), 0.5 answers a second" in out
    assert "p99 250.0 ms" in out
    assert "converged 1" in out
    code, out, _ = run("load", "http://x", "--json")
    assert json.loads(out) == REPORT.to_json()
    assert plans[1].hops == (2, 3, 4)


def test_command_with_own_data(run, plans, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": q, "steps": [], "answer": "7"}) + "\n" for q in ("3 + 4", "9 - 2")))
    assert run("load", "http://x", "--task", "gsm8k", "--data", path)[0] == 0
    assert plans[0].task.name == "gsm8k"
    assert [example.question for example in plans[0].examples] == ["3 + 4", "9 - 2"]
    assert run("load", "http://x", "--task", "state_tracking")[0] == 0
    assert plans[1].task.name == "state_tracking"
    for wrong in (["--data", path], ["--task", "gsm8k", "--data", path, "--hops", "2"], ["--task", "chess"]):
        code, out, err = run("load", "http://x", *wrong)
        assert (code, out, len(plans)) == (1, "", 2)
        assert err.startswith("slr: ")
