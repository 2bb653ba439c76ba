"""Server-sent events: contents, start, failure, disconnects."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from slr_server import sse
from slr_server.app import create_app
from slr_server.protocol.schema import ErrorResponse
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events
from tests.server.asgi import Caller
from tests.server.conftest import sample
from tests.server.process import Server

BODY = {"prompt": "w1 w2", "max_new_tokens": 5, "stream": True}


def stream(client, path="/generate", **changes):
    response = client.post(path, json={**BODY, **changes})
    assert response.status_code == 200, response.text
    return response, events.of(response.text)


def of(told, name, index=0):
    return [event.data for event in told if event.name == name and event.data["index"] == index]


@pytest.mark.parametrize("path", ["/generate", "/trace"])
def test_stream_equals_whole(client, path):
    whole = client.post(path, json={**BODY, "stream": False}).json()["results"][0]
    response, told = stream(client, path)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    names = [event.name for event in told]
    iterations, tokens = whole["iterations"], whole["usage"]["completion_tokens"]
    assert names == ["iteration"] * iterations + ["token"] * tokens + ["result", "done"]
    (result,) = of(told, "result")
    assert {**result, "timings": None, "trace": None} == {**whole, "timings": None, "trace": None}
    assert "".join(token["text"] for token in of(told, "token")) == whole["text"]
    assert [iteration["t"] for iteration in of(told, "iteration")] == list(range(1, iterations + 1))
    assert set(told[-1].data) == {"id", "model", "created"}
    if path == "/trace":
        shown = [{k: v for k, v in i.items() if k not in ("index", "duration_s")} for i in of(told, "iteration")]
        assert shown == [{k: v for k, v in i.items() if k != "duration_s"} for i in result["trace"]]
        assert shown[0]["top_tokens"]


def test_stream_of_several_answers(client, reference):
    prompts = list(tiny.PROMPTS[:3])
    _, told = stream(client, prompt=prompts, n=2, max_new_tokens=6)
    for index in range(6):
        expected = generate(reference, [tiny.request(reference, prompts[index // 2])])[0]
        assert "".join(token["text"] for token in of(told, "token", index)) == expected.text
        assert [token["token_id"] for token in of(told, "token", index)] == list(expected.token_ids)
        assert len(of(told, "iteration", index)) == expected.iterations
        assert of(told, "result", index)[0]["text"] == expected.text
    assert [event.name for event in told].count("done") == 1


@pytest.mark.parametrize("stop", [["w16"], []])
def test_stop_strings_in_streams(client, stop):
    _, told = stream(client, stop=stop, max_new_tokens=12)
    (result,) = of(told, "result")
    assert "".join(token["text"] for token in of(told, "token")) == result["text"]
    assert not stop or stop[0] not in result["text"]


@pytest.fixture
def cleaned(tmp_path):
    """A server of its own, with a tokenizer whose clean-up of spaces would rewrite earlier text."""
    # In place of words that the model writes. A lone apostrophe takes back the blank before it with the next token.
    marks = {"w15": "'", "w22": ".", "w12": "'s", "w30": "n't"}
    words = [marks.get(word, word) for word in tiny.WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = LatentReasoner(tiny.base(), tokenizer, tiny.config(text={"chat_template": template}))
    tiny.shake(model)
    model.save_pretrained(str(tmp_path / "model"))
    tiny.edit_json(tmp_path / "model" / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    started = Server(tmp_path / "model", tmp_path / "log")
    yield started.url, AutoTokenizer.from_pretrained(tmp_path / "model")
    started.kill()


@pytest.mark.slow
def test_stream_with_clean_up_of_spaces(cleaned):
    """On all three endpoints, over sockets, the parts of a stream are the unstreamed text."""
    url, tokenizer = cleaned
    assert tokenizer.clean_up_tokenization_spaces
    rewritten = 0
    for path, options, limit in (
        ("/generate", {"prompt": "{}"}, "max_new_tokens"),
        ("/v1/completions", {"prompt": "{}", "temperature": 0}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "{}"}], "temperature": 0}, "max_tokens"),
    ):
        for prompt in ("w20", "w16 w17", "w8"):
            body = {**json.loads(json.dumps(options).replace("{}", prompt)), limit: 20}
            whole = httpx.post(url + path, json=body, timeout=60).json()
            told = events.of(httpx.post(url + path, json={**body, "stream": True}, timeout=60).text)
            if path == "/generate":
                text, parts = whole["results"][0]["text"], [token["text"] for token in of(told, "token")]
            else:
                chat, (choice,) = "chat" in path, whole["choices"]
                text = choice["message"]["content"] if chat else choice["text"]
                choices = [event.data["choices"][0] for event in told if event.data != "[DONE]"]
                parts = [c["delta"].get("content") or "" if chat else c["text"] for c in choices]
            assert "".join(parts) == text
            assert sum(map(bool, parts)) > 5
            rewritten += tokenizer.clean_up_tokenization(text) != text
    assert rewritten > 5


def test_refused_stream_status(gated, gate):
    client = gated(max_queue=2)
    assert client.post("/generate", json={**BODY, "n": 3}).status_code == 400
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json={**BODY, "n": 2})
        assert gate.reached.wait(20)
        engine = client.app.state.service.check()
        waiting = [engine.submit(tiny.request(engine.reasoner, "w1")) for _ in range(2)]
        refused = client.post("/generate", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        gate.opened.set()
        assert first.result(20).status_code == 200
        for future in waiting:
            future.result(20)


def test_error_before_first_event(gated, gate):
    client = gated()
    gate.opened.set()
    gate.fail_next = True
    response = client.post("/generate", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


def test_failed_stream_has_no_end(reasoner, caplog):
    calls = 0

    def fail_later(*_):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("secret of the engine")

    async def scenario(engine):
        app = create_app(ServerSettings(), engine)
        async with app.router.lifespan_context(app):
            caller = Caller(app, "/generate", {**BODY, "max_iterations": 8})
            await caller.call()
            return caller, app.state.service

    with Engine(tiny.twin(reasoner), threads=1) as engine:
        engine.submit(tiny.request(engine.reasoner, "w1 w2")).result()
        engine.model.base_model.register_forward_pre_hook(fail_later)
        caller, service = asyncio.run(scenario(engine))
    told = events.of(caller.text)
    assert caller.sent[0]["status"] == 200
    assert [event.name for event in told] == ["iteration"] * 3 + ["error"]
    assert told[-1].data["error"]["code"] == "internal_error"
    ErrorResponse.model_validate(told[-1].data)
    assert "secret" not in caller.text
    assert "secret" in caplog.text
    assert all(message["more_body"] for message in caller.sent[1:]), "the final chunk is missing"
    value = service.metrics.registry.get_sample_value
    assert value("slr_requests_total", {"endpoint": "/generate", "status": "error"}) == 1


def test_timeout_in_stream(gated, gate):
    client = gated(request_timeout_s=2)
    made = []

    def pause_later(*_):
        made.append(1)
        if len(made) == 4:
            gate.opened.clear()

    gate.opened.set()
    engine = client.app.state.service.check()
    engine.model.base_model.register_forward_pre_hook(pause_later)
    _, told = stream(client)
    gate.opened.set()
    assert told[0].name == "iteration"
    assert told[-1].name == "error"
    assert told[-1].data["error"]["code"] == "timeout"
    assert sample(client, "slr_requests_total", endpoint="/generate", status="timeout") == 1


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("path", ["/generate", "/trace"])
def test_disconnect_frees_slot(reasoner, gate, path, streamed):
    body = {**BODY, "stream": streamed, "n": 3, "max_new_tokens": 40}

    async def scenario(engine):
        app = create_app(ServerSettings(), engine)
        async with app.router.lifespan_context(app):
            caller = Caller(app, path, body)
            request = asyncio.create_task(caller.call())
            await asyncio.to_thread(gate.reached.wait, 20)
            steps = engine.counters.steps
            caller.leave()
            await asyncio.wait_for(request, 20)
            gate.opened.set()
            while engine.in_flight or engine.queued:
                await asyncio.sleep(0.001)
            value = app.state.service.metrics.registry.get_sample_value
            assert value("slr_requests_total", {"endpoint": path, "status": "cancelled"}) == 1
            assert engine.counters.steps <= steps + 1
            assert engine.counters.tokens == 0

    with Engine(tiny.twin(reasoner), slots=2, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        asyncio.run(scenario(engine))


def test_disconnect_from_stream(engine):
    async def scenario():
        app = create_app(ServerSettings(), engine)
        async with app.router.lifespan_context(app):
            caller = Caller(app, "/generate", {**BODY, "n": 4, "max_new_tokens": 50})
            request = asyncio.create_task(caller.call())
            await caller.heard.wait()
            caller.leave()
            await asyncio.wait_for(request, 20)
            while engine.in_flight or engine.queued:
                await asyncio.sleep(0.001)
            assert "done" not in [event.name for event in events.of(caller.text)]
            value = app.state.service.metrics.registry.get_sample_value
            assert value("slr_requests_total", {"endpoint": "/generate", "status": "cancelled"}) == 1

    asyncio.run(scenario())


def test_slow_reader(engine):
    async def scenario():
        app = create_app(ServerSettings(write_timeout_s=0.05), engine)
        async with app.router.lifespan_context(app):
            caller = Caller(app, "/generate", {**BODY, "max_new_tokens": 50})

            async def send(message):
                await Caller._send(caller, message)
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()  # as if the connection's buffer were full

            caller._send = send
            bystander = Caller(app, "/generate", BODY)
            await asyncio.wait_for(asyncio.gather(caller.call(), bystander.call()), 20)
            assert events.of(bystander.text)[-1].name == "done"
            while engine.in_flight or engine.queued:
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_pings(monkeypatch):
    monkeypatch.setattr(sse, "PING_S", 0.01)

    async def scenario():
        begun = asyncio.Event()

        async def frames():
            yield b"one"
            await begun.wait()
            yield b"two"

        heard = []
        async for each in sse._with_pings(frames()):
            heard.append(each)
            if each == sse.COMMENT:
                begun.set()
        return heard

    heard = asyncio.run(scenario())
    assert heard[0] == b"one"
    assert heard[-1] == b"two"
    assert sse.COMMENT in heard
