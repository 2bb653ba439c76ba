"""Every operator limit on every endpoint that runs the model, streaming and not."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.reasoner import LatentReasoner
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events

NATIVE, COMPLETIONS, CHAT = ("/generate", "/trace"), "/v1/completions", "/v1/chat/completions"
PATHS = (*NATIVE, COMPLETIONS, CHAT)
PROMPT = "w1 w2 w3"
FIXED = {"convergence": {"criterion": "fixed"}}


def body(path, *, prompt=PROMPT, tokens=2, loop=None, **fields):
    """A body in the endpoint's own field names; its loop runs to its maximum."""
    loop = FIXED | (loop or {})
    if path in NATIVE:
        return {"prompt": prompt, **({} if tokens is None else {"max_new_tokens": tokens}), **loop, **fields}
    limit = {} if tokens is None else {"max_tokens": tokens}
    prompts = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    return {**prompts, **limit, "slr": loop, "temperature": 0, **fields}


@pytest.fixture(scope="module")
def engine():
    # Defaults that are above the limits below.
    text = {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}", "max_new_tokens": 8}
    made = tiny.reasoner(text=text)
    with Engine(made, threads=1, slots=4) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _endless(monkeypatch):
    """Answers end at their token limit."""
    monkeypatch.setattr(LatentReasoner, "end_tokens", frozenset())


@pytest.fixture
def post(engine):
    """Sends a request to a server with the given settings."""
    clients = {}

    def ask(path, given, stream=False, **settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in clients:
            clients[key] = TestClient(create_app(ServerSettings(**settings), engine)).__enter__()
        return clients[key].post(path, json={**given, "stream": stream})

    yield ask
    for client in clients.values():
        client.__exit__(None, None, None)


def loop_name(path, name):
    return name if path in NATIVE else f"slr.{name}"


def prompt_name(path):
    return "messages" if path == CHAT else "prompt"


def cases():
    """Setting, its value, path, a body at the limit, one above it, and the field at fault."""
    for path in PATHS:
        prompt, tokens = prompt_name(path), "max_new_tokens" if path in NATIVE else "max_tokens"
        yield "max_prompt_tokens", 3, path, body(path), body(path, prompt=f"{PROMPT} w4"), prompt
        yield "max_n", 2, path, body(path, n=2), body(path, n=3), "n"
        yield "max_queue", 2, path, body(path, n=2), body(path, n=3), "n"
        yield "max_new_tokens", 3, path, body(path, tokens=3), body(path, tokens=4), tokens
        for name in ("max_iterations", "min_iterations"):
            at, above = (body(path, loop={name: n}) for n in (2, 3))
            yield "max_iterations", 2, path, at, above, loop_name(path, name)
        if path != CHAT:
            lists = [PROMPT] * 2, [PROMPT] * 3
            at, above = (body(path, prompt=prompts) for prompts in lists)
            yield "max_prompts", 2, path, at, above, prompt
            yield "max_queue", 2, path, at, above, prompt
    yield (
        "max_new_tokens",
        3,
        CHAT,
        *(body(CHAT, tokens=None, max_completion_tokens=n) for n in (3, 4)),
        "max_completion_tokens",
    )
    yield "max_top_tokens", 2, "/trace", *(body("/trace", top_tokens=n) for n in (2, 3)), "top_tokens"
    yield "max_top_tokens", 2, COMPLETIONS, *(body(COMPLETIONS, logprobs=n) for n in (2, 3)), "logprobs"
    yield "max_top_tokens", 2, CHAT, *(body(CHAT, logprobs=True, top_logprobs=n) for n in (2, 3)), "top_logprobs"
    loops = [body("/trace", include_states=True, loop={"max_iterations": n}) for n in (2, 3)]
    yield "max_state_values", 2 * 32, "/trace", *loops, "include_states"


CASES = [pytest.param(*case, id=f"{case[0]} {case[2]} {case[5]}") for case in cases()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("setting", "limit", "path", "at", "above", "param"), CASES)
def test_limit(post, setting, limit, path, at, above, param, stream):
    accepted = post(path, at, stream, **{setting: limit})
    assert accepted.status_code == 200, accepted.text
    refused = post(path, above, stream, **{setting: limit})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert param in error["message"]
    assert str(limit) in error["message"]


def finished(path, response, stream):
    """Iterations and tokens of the only answer."""
    assert response.status_code == 200, response.text
    if not stream:
        whole = response.json()
        usage = whole["results"][0]["usage"] if path in NATIVE else whole["usage"]
        loop = whole["results"][0] if path in NATIVE else whole["choices"][0]["slr"]
        return loop["iterations"], usage["completion_tokens"]
    told = [event.data for event in events.of(response.text)]
    if path in NATIVE:
        (result,) = (data for data in told if "usage" in data)
        return result["iterations"], result["usage"]["completion_tokens"]
    (loop,) = (data["choices"][0]["slr"] for data in told[:-1] if data["choices"] and data["choices"][0].get("slr"))
    return loop["iterations"], told[-2]["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_limits_bound_the_defaults(post, path, stream):
    usage = {"stream_options": {"include_usage": True}} if stream and path not in NATIVE else {}
    given = body(path, tokens=None, **usage)
    unlimited = finished(path, post(path, given, stream), stream)
    assert unlimited == (5, 8), "the checkpoint's own defaults"
    limited = post(path, given, stream, max_iterations=2, max_new_tokens=3)
    assert finished(path, limited, stream) == (2, 3)
    assert finished(path, post(path, given, stream, max_iterations=0), stream)[0] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_openai_default_of_max_tokens(post, engine, monkeypatch, path, stream):
    text = engine.reasoner.config.text.model_copy(update={"max_new_tokens": 30})
    monkeypatch.setattr(engine.reasoner, "config", engine.reasoner.config.model_copy(update={"text": text}))
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    given = body(path, tokens=None, **usage)
    assert finished(path, post(path, given, stream), stream)[1] == (16 if path == COMPLETIONS else 30)
    assert finished(path, post(path, given, stream, max_new_tokens=20), stream)[1] == (
        16 if path == COMPLETIONS else 20
    )


@pytest.mark.parametrize("path", PATHS)
def test_top_tokens_in_traces_only(post, path):
    limits = {"max_top_tokens": 1, "max_state_values": 10**6}
    answer = post(path, body(path), **limits).json()
    if path == "/trace":
        assert {len(step["top_tokens"]) for step in answer["results"][0]["trace"]} == {1}, "the default is bounded"
    else:
        assert "top_tokens" not in json.dumps(answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_body_size(post, path, stream):
    size = len(json.dumps({**body(path), "stream": stream}, separators=(",", ":")).encode())
    assert post(path, body(path), stream, max_body_bytes=size + 20).status_code == 200
    refused = post(path, body(path, prompt="w1 " * 99), stream, max_body_bytes=size + 20)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_full_queue(gated, gate, path, stream):
    client = gated(max_queue=1)
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json=body("/generate"))
        assert gate.reached.wait(20)
        waiting = engine.submit(tiny.request(engine.reasoner, "w1"))
        refused = client.post(path, json={**body(path), "stream": stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert first.result(20).status_code == 200
        waiting.result(20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_request_timeout(reasoner, gate, path, stream):
    made = tiny.reasoner(text={"chat_template": "w1"})
    with Engine(made, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        with TestClient(create_app(ServerSettings(request_timeout_s=0.2), engine)) as client:
            response = client.post(path, json={**body(path), "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        gate.opened.set()
