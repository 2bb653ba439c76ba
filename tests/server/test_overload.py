"""Overload: refused before the body is read, with an honest Retry-After; time limits start at arrival."""

import asyncio
import time
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_server.app import create_app
from slr_server.errors import QueueFull
from slr_server.observability.request_stats import RequestStats
from slr_server.overload import BodyLimit, RequestLimit
from slr_server.settings import ServerSettings
from tests import tiny
from tests.hostile import overload as attacks
from tests.server.asgi import Caller
from tests.server.conftest import KEY
from tests.server.process import Server

BODY = {"prompt": "w1 w2", "max_new_tokens": 2}


class WithoutBody(Caller):
    """Sends headers, and a body only when asked to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = False

    async def _receive(self):
        self.read = True
        return await super()._receive()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@contextmanager
def served(reasoner, gate, **settings):
    with Engine(tiny.twin(reasoner), slots=1, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        yield create_app(ServerSettings(**settings), engine), engine


@pytest.mark.parametrize(
    ("settings", "requests", "told"),
    [({"max_queue": 1}, 2, "the queue is full"), ({"max_requests": 2}, 2, "too many requests in progress")],
)
def test_refused_before_the_body(reasoner, gate, settings, requests, told):
    async def scenario(app, engine):
        async with app.router.lifespan_context(app):
            tasks = []
            for i in range(requests):
                tasks.append(asyncio.create_task(Caller(app, "/generate", BODY).call()))
                await until(lambda i=i: engine.in_flight + engine.queued == i + 1 and engine.in_flight)
            refused = WithoutBody(app, "/generate", BODY)
            await refused.call()
            assert refused.sent[0]["status"] == 429
            assert told in refused.text
            assert int(dict(refused.sent[0]["headers"])[b"retry-after"]) >= 1
            assert not refused.read
            gate.opened.set()
            await asyncio.gather(*tasks)
            again = WithoutBody(app, "/generate", BODY)
            await again.call()
            assert again.sent[0]["status"] == 200

    with served(reasoner, gate, **settings) as (app, engine):
        asyncio.run(scenario(app, engine))


def test_unfinished_body_takes_no_place():
    """A request counts only when its body has arrived."""
    limit = RequestLimit(1, create_app(ServerSettings(), None).state.service._admission)
    limit.check()
    limit.begin()
    with pytest.raises(QueueFull):
        limit.check()
    limit.end()
    limit.begin()


def test_unfinished_bodies_share_a_budget():
    """Beyond it, the one that has been arriving longest is refused."""

    async def scenario():
        passed = []
        limit = BodyLimit(lambda scope, *_: asyncio.sleep(0, passed.append(scope["i"])), limit=100, timeout_s=20)
        ended = asyncio.Event()
        statuses = {}

        def start(i):
            parts = iter([99, 0])

            async def receive():
                size = next(parts)
                if size == 0:
                    await ended.wait()
                return {"type": "http.request", "body": b"x" * size, "more_body": size > 0}

            async def send(message):
                statuses.setdefault(i, message.get("status"))

            scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "i": i}
            return asyncio.create_task(limit(scope, receive, send))

        tasks = []
        for i in range(67):
            tasks.append(start(i))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        ended.set()
        await asyncio.gather(*tasks)
        assert statuses == {0: 408, 1: 408, 2: 408}
        assert passed == list(range(3, 67))

    asyncio.run(scenario())


def test_deadline_starts_at_arrival(engine):
    async def scenario():
        app = create_app(ServerSettings(request_timeout_s=100), engine)
        async with app.router.lifespan_context(app):
            for path in ("/generate", "/trace"):
                caller = Caller(app, path, BODY)
                await caller.call({"slr_request_stats": RequestStats(arrived_at=time.monotonic() - 100)})
                assert caller.sent[0]["status"] == 504

    asyncio.run(scenario())


def test_deadline_covers_encoding(engine, monkeypatch):
    monkeypatch.setattr("slr_server.routes.common._is_large", lambda *_: True)
    monkeypatch.setattr("slr_server.routes.common._encode", lambda *_: time.sleep(0.6))
    with TestClient(create_app(ServerSettings(request_timeout_s=0.5), engine)) as client:
        response = client.post("/generate", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.slow
def test_overload(tiny_checkpoint):
    """At many times the rate that saturates it, a server refuses quickly, stays alive and counts what clients saw."""
    log = tiny_checkpoint.parent / "overload"
    flags = ("--slots", "2", "--max-queue", "2", "--max-new-tokens", "60", "--api-keys", KEY)
    server = Server(tiny_checkpoint, log, *flags, key=KEY)
    try:
        body = {"prompt": "w1", "max_new_tokens": 40, "max_iterations": 8, "convergence": {"criterion": "fixed"}}
        before = server.metrics()
        seen = attacks.overload(server.url, body, key=KEY, rate=300, seconds=4)
        server.idle()
        after = server.metrics()
        counted = {
            s: after[n] - before[n] for s in ("ok", "rejected") for n in [f"slr_requests_total{{/generate,{s}}}"]
        }
        assert counted == {"ok": seen.statuses[200], "rejected": seen.statuses[429]}
        assert set(seen.statuses) == {200, 429}
        assert min(seen.retry_after) >= 1
        assert seen.refusal_s < 2
        assert seen.liveness_s < 4
    finally:
        server.kill()


@pytest.mark.slow
def test_gradings_and_scrapes(guarded):
    """Before there were limits, a short grading waited for those of clients that had left, two minutes."""
    assert attacks.gradings(guarded.url, KEY) < 5
    assert attacks.scrapes(guarded.url, KEY) < 1
