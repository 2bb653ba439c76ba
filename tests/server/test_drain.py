"""Shutdown: running requests finish within the grace period, waiting and new ones get 503."""

import asyncio
import threading

from slr_core.engine import Engine
from slr_server.app import create_app
from slr_server.protocol.grade import GradeResponse
from slr_server.routes import common, grade
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events
from tests.server.asgi import Caller

BODY = {"prompt": "w1 w2", "max_new_tokens": 3}


async def served(engine, **settings):
    app = create_app(ServerSettings(**settings), engine)
    return app, app.router.lifespan_context(app)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def code(caller):
    return caller.sent[0]["status"]


def test_drain(reasoner, gate):
    async def scenario(engine):
        app, life = await served(engine)
        async with life:
            service = app.state.service
            running = Caller(app, "/generate", {**BODY, "n": 3})  # one of the three waits, but its request has started
            streaming = Caller(app, "/trace", {**BODY, "stream": True})
            waiting = Caller(app, "/generate", BODY)
            tasks = [asyncio.create_task(running.call())]
            await until(lambda: engine.in_flight)
            tasks += [asyncio.create_task(waiting.call()), asyncio.create_task(streaming.call())]
            await until(lambda: engine.queued + engine.in_flight == 5)
            service.drain()
            await asyncio.wait_for(tasks[1], 20)
            await asyncio.wait_for(tasks[2], 20)
            assert code(waiting) == code(streaming) == 503
            late = Caller(app, "/generate", BODY)
            await late.call()
            assert code(late) == 503
            assert not service.ready
            assert not service.draining.done()
            gate.opened.set()
            await asyncio.wait_for(service.draining, 20)
            await tasks[0]
            assert code(running) == 200
            assert running.text.count('"text"') == 3

    with Engine(tiny.twin(reasoner), slots=2, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        asyncio.run(scenario(engine))


def test_grace_period_ends(reasoner, gate):
    async def scenario(engine):
        app, life = await served(engine, grace_s=0.05)
        async with life:
            service = app.state.service
            caller = Caller(app, "/generate", BODY)
            task = asyncio.create_task(caller.call())
            await until(lambda: engine.in_flight == 1)
            service.drain()
            await asyncio.wait_for(task, 20)
            assert code(caller) == 503
            gate.opened.set()
            await asyncio.wait_for(service.draining, 20)
            await until(lambda: not engine.in_flight)

    with Engine(tiny.twin(reasoner), slots=2, threads=1) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        asyncio.run(scenario(engine))


def test_running_stream_finishes(engine):
    async def scenario():
        app, life = await served(engine)
        async with life:
            service = app.state.service
            caller = Caller(app, "/generate", {**BODY, "max_new_tokens": 40, "stream": True})
            task = asyncio.create_task(caller.call())
            await caller.heard.wait()
            service.drain()
            await asyncio.wait_for(service.draining, 20)
            await task
            assert events.of(caller.text)[-1].name == "done"

    asyncio.run(scenario())


def test_an_idle_server_ends_at_once(engine):
    async def scenario():
        app, life = await served(engine)
        async with life:
            app.state.service.drain()
            await asyncio.wait_for(app.state.service.draining, 20)

    asyncio.run(scenario())


def test_end_while_loading(monkeypatch, reasoner, gate):
    """The end does not wait for a load; its engine is closed when it has loaded."""
    engine = Engine(tiny.twin(reasoner), threads=1)

    def load(*_, **__):
        gate()
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", load)

    async def scenario():
        app = create_app(ServerSettings(threads=1))
        async with app.router.lifespan_context(app):
            await until(gate.reached.is_set)
        assert engine.alive
        gate.opened.set()
        await until(lambda: not engine.alive)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_grading_and_encoding_have_the_grace_period(engine, monkeypatch):
    gate, begun = threading.Event(), []

    def grade_slowly(body, given_up):
        begun.append(body)
        gate.wait(10)
        return GradeResponse(task="text", correct=[True])

    def encode_slowly(formatter, answers):
        begun.append(answers)
        gate.wait(10)
        return b"{}"

    monkeypatch.setattr(grade, "_grade", grade_slowly)
    monkeypatch.setattr(common, "_encode", encode_slowly)
    monkeypatch.setattr(common, "_SMALL_RESPONSE", 0)
    question = {"questions": [{"question": "w", "answer": "w"}], "texts": ["w"]}

    async def scenario():
        app, life = await served(engine)
        async with life:
            service = app.state.service
            callers = [Caller(app, "/grade", question), Caller(app, "/grade", question), Caller(app, "/trace", BODY)]
            tasks = [asyncio.create_task(caller.call()) for caller in callers]
            await until(lambda: len(begun) == 2 and service.grader.awaited == 2)
            service.drain()
            late = Caller(app, "/grade", question)
            await late.call()
            assert code(late) == 503
            await asyncio.sleep(0.05)
            assert not service.draining.done()
            tasks[1].cancel()  # as uvicorn does in the end
            await tasks[1]
            assert code(callers[1]) == 503
            assert "shutting down" in callers[1].text
            gate.set()
            await asyncio.gather(*tasks, service.draining)
            assert [code(caller) for caller in callers] == [200, 503, 200]

    asyncio.run(scenario())
