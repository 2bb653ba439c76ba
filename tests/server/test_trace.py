"""States and thoughts in traces."""

import asyncio
import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from slr_core.types import TokenScore
from slr_server.app import create_app
from slr_server.protocol import native as schemas
from slr_server.protocol.schema import Answer
from slr_server.routes import common
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server.asgi import Caller

WORKSPACES = ("append", "block", "prompt")
LATENT = {"hidden_size": 16, "layers": 1, "heads": 2, "max_thought_tokens": 4}


@contextmanager
def serving(made, **settings):
    with Engine(made) as engine, TestClient(create_app(ServerSettings(**settings), engine)) as client:
        yield client


@pytest.fixture
def client(shared_client):
    return shared_client


def trace(client, prompt=tiny.PROMPTS[1], **more):
    body = {"prompt": prompt, "max_new_tokens": 2, "max_iterations": 3, "convergence": {"criterion": "fixed"}, **more}
    response = client.post("/trace", json=body)
    assert response.status_code == 200, response.text
    schemas.TraceResponse.model_validate_json(response.content)
    return response.json()["results"]


@pytest.mark.parametrize(("workspace", "width"), [("append", 1), ("block", 3), ("prompt", 5)])
def test_states_of_every_iteration(workspace, width):
    made = tiny.reasoner(loop={"workspace": workspace, "block_size": 3})
    request = tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 3, "criterion": "fixed"}, include_states=True)
    (expected,) = generate(made, [request])
    with serving(made) as client:
        (shown,) = trace(client, include_states=True)
    states = torch.tensor([step["state"] for step in shown["trace"]])
    assert states.shape == (3, width, 32)
    torch.testing.assert_close(states, expected.states[1:], rtol=1e-4, atol=1e-4)


def test_states_per_prompt():
    made = tiny.reasoner(loop={"workspace": "prompt"})
    with serving(made) as client:
        results = trace(client, list(tiny.PROMPTS[:4]), include_states=True)
    widths = [{len(step["state"]) for step in result["trace"]} for result in results]
    assert widths == [{1}, {5}, {4}, {9}]


@pytest.mark.parametrize("asked", [{}, {"include_states": False}, {"include_states": None}], ids=str)
def test_states_on_request(client, asked):
    (shown,) = trace(client, **asked)
    assert shown["trace"]
    assert all("state" not in step for step in shown["trace"])


def test_no_states_without_iterations(client):
    (shown,) = trace(client, max_iterations=0, include_states=True)
    assert shown["trace"] == []


@pytest.mark.parametrize(
    ("limit", "status"), [(3 * 32, 200), (3 * 32 - 1, 400), (0, 400)], ids=["enough", "short", "none"]
)
def test_states_size_limit(engine, limit, status):
    body = {"prompt": "w1", "max_iterations": 3, "max_new_tokens": 1, "include_states": True}
    with TestClient(create_app(ServerSettings(max_state_values=limit), engine)) as client:
        response = client.post("/trace", json=body)
        assert response.status_code == status
        if status == 400:
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("include_states", "invalid_value")
            assert "include_states" in error["message"]
            assert str(limit) in error["message"]
        assert client.post("/trace", json={**body, "include_states": False}).status_code == 200


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_include_states_is_a_boolean(client, value):
    response = client.post("/trace", json={"prompt": "w1", "include_states": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "include_states"


def test_states_belong_to_traces(client):
    response = client.post("/generate", json={"prompt": "w1", "include_states": True})
    assert response.json()["error"]["code"] == "unknown_field"


def test_non_finite_state_values_are_null(client, monkeypatch, engine):
    real = engine.reasoner.residual.forward

    def spoil(g, *others):
        h = real(g, *others).clone()
        h[..., 3] = float("inf")
        h[..., 5] = float("nan")
        return h

    monkeypatch.setattr(engine.reasoner.residual, "forward", spoil)
    (shown,) = trace(client, include_states=True)
    (step,) = shown["trace"]
    (state,) = step["state"]
    assert shown["exit_reason"] == "diverged"
    assert [i for i, value in enumerate(state) if value is None] == [3, 5]


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_thoughts(workspace):
    loop = {"workspace": workspace, "block_size": 3, "decoder": {"latent_decoder": LATENT}}
    made = tiny.reasoner(loop=loop)
    request = tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 3, "criterion": "fixed"}, trace=True)
    (expected,) = generate(made, [request])
    with serving(made) as client:
        (shown,) = trace(client)
        plain = client.post("/generate", json={"prompt": "w1", "max_new_tokens": 2})
    assert [step["thought"] for step in shown["trace"]] == [record.thought for record in expected.records]
    assert "thought" not in plain.text


def test_no_thoughts_without_decoder(client):
    (shown,) = trace(client)
    assert all("thought" not in step for step in shown["trace"])


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_undefined_measures_are_null(workspace):
    with serving(tiny.reasoner(loop={"workspace": workspace, "halting_head": True})) as client:
        (shown,) = trace(client, convergence={"criterion": "learned", "threshold": 1.0})
    first, second = shown["trace"]
    assert (shown["iterations"], shown["exit_reason"]) == (2, "converged")
    for name in ("relative_change", "cosine", "contraction", "kl"):
        assert first[name] is None
        assert (second[name] is None) == (name == "contraction")
    assert first["entropy"] > 0


def test_thoughts_and_states_are_documented(client):
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("thought", "state"):
        shown = schema["Iteration"]["properties"][name]
        assert shown["description"]
        assert name not in schema["Iteration"]["required"]
    state = json.dumps(schema["Iteration"]["properties"]["state"])
    assert state.count('"array"') == 2
    assert schema["TraceRequest"]["properties"]["include_states"]["description"]
    assert "include_states" not in schema["GenerateRequest"]["properties"]


def test_request_fields_are_documented(client):
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("GenerateRequest", "TraceRequest", "Convergence"):
        for field, value in schema[name]["properties"].items():
            assert value.get("description") or "$ref" in json.dumps(value), f"{name}.{field}"


def test_trace_tokens():
    made = tiny.reasoner(loop={"workspace": "token", "max_iterations": 3})
    with serving(made, max_response_values=20) as client:
        (shown,) = trace(client, "w1 w2", trace_tokens=2, top_tokens=2)
        assert shown["token_traces"][0] == shown["trace"]
        assert [len(loop) for loop in shown["token_traces"]] == shown["iterations_per_token"]
        assert all(len(step["top_tokens"]) == 2 and step["entropy"] > 0 for step in shown["token_traces"][1])
        assert "token_traces" not in trace(client, "w1 w2")[0]
        body = {"prompt": "w1", "max_iterations": 3, "trace_tokens": 4, "top_tokens": 2, "max_new_tokens": 4}
        error = client.post("/trace", json=body).json()["error"]
        assert (error["param"], error["code"]) == ("trace_tokens", "invalid_value")


def test_trace_tokens_elsewhere(client):
    response = client.post("/trace", json={"prompt": "w1", "trace_tokens": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "trace_tokens")


def test_chat():
    messages = [{"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("user", "w3"))]
    with serving(
        tiny.reasoner(text={"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"})
    ) as client:
        assert client.get("/checkpoint").json()["chat"]
        assert trace(client, messages)[0]["text"] == trace(client, "w1 w2 w3")[0]["text"]
        for wrong, param in (
            ([{"role": "tool", "content": ""}], "prompt.0.role"),
            ([{"role": "user", "content": "w1", "more": 1}], "prompt.0.more"),
            ([{"role": "user"}], "prompt.0.content"),
            ([*messages, "w1"], "prompt.3"),
            ([{"role": "user", "content": "w1 " * 500}], "prompt"),
        ):
            response = client.post("/trace", json={"prompt": wrong})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_chat_of_one_message(client):
    assert not client.get("/checkpoint").json()["chat"]
    response = client.post("/trace", json={"prompt": [{"role": "user", "content": "w1"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_large_responses_are_encoded_one_at_a_time(engine, monkeypatch):
    running, most, encode = 0, 0, common._encode

    def slow(*arguments):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return encode(*arguments)

    async def scenario():
        app = create_app(ServerSettings(), engine)
        async with app.router.lifespan_context(app):
            callers = [Caller(app, "/trace", {"prompt": "w1 w2", "max_new_tokens": 1}) for _ in range(4)]
            await asyncio.gather(*(caller.call() for caller in callers))
        assert all('"trace":[' in caller.text for caller in callers)

    monkeypatch.setattr(common, "_encode", slow)
    monkeypatch.setattr(common, "_SMALL_RESPONSE", 0)
    asyncio.run(scenario())
    assert most == 1


def test_scores_of_the_prompt_make_a_response_large():
    job = SimpleNamespace(trace=False, include_states=False, logprobs=9)
    score = TokenScore(1, -1.0, ())

    def is_large(**scores):
        return common._is_large(
            job, [Answer(None, SimpleNamespace(**{"scores": (), "prompt_scores": ()} | scores), False)]
        )

    many = (score,) * (common._SMALL_RESPONSE // 10 + 1)
    assert not is_large()
    assert is_large(scores=many)
    assert is_large(prompt_scores=many)
