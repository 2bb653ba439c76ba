"""The client against the application itself, and against servers that refuse, break off or are not there."""

import asyncio
import json
import time

import httpx
import pytest

from slr_core.client import AsyncClient, Client
from slr_core.client.core import ConvergenceFields, GenerateFields, TraceFields
from slr_core.engine import Engine
from slr_core.errors import ConfigError, EngineError, RequestError
from slr_core.generation.reference import generate
from slr_server.app import create_app
from slr_server.protocol.native import GenerateRequest, TraceRequest
from slr_server.protocol.schema import Convergence
from slr_server.settings import ServerSettings
from tests import tiny

PROMPT = tiny.PROMPTS[1]
KEY = "k" * 20
DONE = b'event: token\ndata: {"index": 0}\n\n: comment\n\nevent: done\ndata: {"id": "x"}\n\n'


class Both:
    """The two clients behind one face: what one does, the other must do."""

    def __init__(self, kind, transport, **options):
        made = {"sync": Client, "async": AsyncClient}[kind]
        self.kind, self.options = made, {"transport": transport, **options}

    def run(self, method, *arguments, **fields):
        if self.kind is Client:
            with Client("http://server", **self.options) as client:
                answer = getattr(client, method)(*arguments, **fields)
                return list(answer) if method == "stream" else answer
        return asyncio.run(self._run(method, *arguments, **fields))

    async def _run(self, method, *arguments, **fields):
        async with AsyncClient("http://server", **self.options) as client:
            if method == "stream":
                return [event async for event in client.stream(*arguments, **fields)]
            return await getattr(client, method)(*arguments, **fields)


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    """The pauses, which nobody waits for."""
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(asyncio, "sleep", pause)
    return pauses


@pytest.fixture(params=["sync", "async"])
def clients(request):
    """Makes a client of a server that answers in turn."""

    def build(*answers, **options):
        left = list(answers)
        asked = []

        def answer(asking):
            asked.append(asking)
            given = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(given, Exception):
                raise given
            if isinstance(given, Broken):
                return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=given)
            return httpx.Response(given.status_code, headers=given.headers, content=given.content)

        made = Both(request.param, httpx.MockTransport(answer), **options)
        made.asked = asked
        return made

    return build


def streamed(content):
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content)


def refusal(status, headers=None, **error):
    detail = {"type": "t", "message": "no", "param": None, "code": "c", **error}
    return httpx.Response(status, json={"error": detail}, headers=headers)


FINE = httpx.Response(200, json={"results": []})


def test_retry_after_is_honoured(clients, slept):
    client = clients(refusal(429, {"Retry-After": "7"}), refusal(503), FINE)
    assert client.run("generate", "w1") == {"results": []}
    assert slept[0] == 7
    assert 0.25 <= slept[1] <= 0.75, "the second pause of its own making"
    assert len(client.asked) == 3


def test_identity_of_the_served_checkpoint(clients, slept):
    client = clients(refusal(503), httpx.Response(200, json={"sha256": None}))
    assert client.run("identity") == {"sha256": None}
    assert {(request.method, request.url.path) for request in client.asked} == {("GET", "/checkpoint/identity")}
    assert len(client.asked) == 2


def test_absurd_pauses_are_not(clients, slept):
    clients(refusal(429, {"Retry-After": "99999"}), FINE).run("generate", "w1")
    assert slept == [60]


def test_retries_end(clients, slept):
    client = clients(refusal(429, {"Retry-After": "1"}), retries=2)
    with pytest.raises(EngineError, match="429, no"):
        client.run("generate", "w1")
    assert slept == [1, 1]
    client = clients(httpx.ConnectError("nobody"), retries=1)
    with pytest.raises(EngineError, match="cannot be reached: nobody"):
        client.run("trace", "w1")
    assert len(client.asked) == 2


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (refusal(400, param="seed"), RequestError, "400, no"),
        (refusal(401), RequestError, "401, no"),
        (refusal(504), EngineError, "504, no"),
        (httpx.Response(502, text="<html>"), EngineError, "502, Bad Gateway"),
        (httpx.Response(200, text="<html>"), EngineError, "not JSON"),
        (httpx.ReadTimeout("slow"), EngineError, "slow"),
    ],
)
def test_what_is_not_sent_again(clients, slept, answer, kind, told):
    client = clients(answer)
    with pytest.raises(kind, match=told) as error:
        client.run("generate", "w1")
    assert slept == []
    assert len(client.asked) == 1
    assert getattr(error.value, "param", None) == ("seed" if "400" in told else None)


def test_a_stream(clients):
    client = clients(refusal(503), streamed(DONE))
    told = client.run("stream", "w1", n=2)
    assert [(event.name, event.data) for event in told] == [("token", {"index": 0}), ("done", {"id": "x"})]
    assert json.loads(client.asked[-1].content) == {"prompt": "w1", "n": 2, "stream": True}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (DONE[:34], "broke off"),
        (b'event: error\ndata: {"error": {"message": "too late"}}\n\n', "broke off: too late"),
        (b"data: {\n\n", "not JSON"),
        (b"", "broke off"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error_and_not_begun_again(clients, content, told):
    client = clients(streamed(content))
    with pytest.raises(EngineError, match=told):
        client.run("stream", "w1")
    assert len(client.asked) == 1


def test_a_stream_is_refused_like_any_request(clients):
    with pytest.raises(RequestError, match="400, no"):
        clients(refusal(400)).run("stream", "w1")


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose connection fails after ``content``."""

    def __init__(self, content):
        self.content = content

    def __iter__(self):
        yield self.content
        raise httpx.ReadError("reset")

    async def __aiter__(self):
        for part in self:
            yield part


@pytest.mark.parametrize(("method", "whole"), [("generate", FINE), ("stream", streamed(DONE))])
def test_broken_body_is_sent_again(clients, slept, method, whole):
    """Where nothing was delivered: an answer is read whole, and a comment is no event."""
    client = clients(Broken(b": comment\n\n"), whole)
    assert client.run(method, "w1")
    assert len(client.asked) == 2
    assert len(slept) == 1
    with pytest.raises(EngineError, match="reset"):
        clients(Broken(b""), retries=0).run(method, "w1")


def test_begun_stream_is_not_sent_again(clients, slept):
    client = clients(Broken(DONE[:33]), streamed(DONE))
    with pytest.raises(EngineError, match="broke off: reset"):
        client.run("stream", "w1")
    assert (len(client.asked), slept) == (1, [])


def test_page_in_place_of_a_stream(clients, slept):
    client = clients(httpx.Response(200, html="<html>"))
    with pytest.raises(EngineError, match="not an event stream"):
        client.run("stream", "w1")
    assert (len(client.asked), slept) == (1, [])


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_url(kind):
    with pytest.raises(ConfigError, match="not a URL"):
        kind("http://[::1:8000")


@pytest.mark.parametrize(
    ("fields", "body"),
    [(GenerateFields, GenerateRequest), (TraceFields, TraceRequest), (ConvergenceFields, Convergence)],
)
def test_fields_are_those_of_http(fields, body):
    assert fields.__annotations__.keys() == body.model_fields.keys() - {"prompt", "stream"}


def test_against_the_application(monkeypatch):
    monkeypatch.undo()  # the application sleeps between its measurements
    made = tiny.reasoner()
    (expected,) = generate(made, [tiny.request(made, PROMPT)])

    async def scenario(engine):
        app = create_app(ServerSettings(api_keys=KEY), engine)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            AsyncClient("http://server", api_key=KEY, transport=transport) as client,
        ):
            whole = await client.generate(PROMPT, max_new_tokens=6)
            traced = await client.trace([PROMPT], max_new_tokens=6)
            told = [event async for event in client.stream(PROMPT, path="/trace", max_new_tokens=6)]
            with pytest.raises(RequestError, match="must not be empty") as refused:
                await client.generate("")
        return whole, traced, told, refused

    with Engine(made, threads=1) as engine:
        whole, traced, told, refused = asyncio.run(scenario(engine))
    assert whole["results"][0]["text"] == expected.text
    assert len(traced["results"][0]["trace"]) == expected.iterations
    assert "".join(event.data["text"] for event in told if event.name == "token") == expected.text
    assert told[-1].name == "done"
    assert refused.value.param == "prompt"
