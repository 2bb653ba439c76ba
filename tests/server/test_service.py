import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

from server.app import create_app
from server.settings import Settings
from slr_core.engine import Engine
from tests import tiny
from tests.server.conftest import sample

BODY = {"prompt": "w1 w2", "max_new_tokens": 2}


def test_a_full_queue(gated, gate):
    client = gated(max_queue=3)
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json=BODY)
        assert gate.reached.wait(20)
        waiting = [engine.submit(tiny.request(engine.reasoner, "w1")) for _ in range(2)]
        refused = client.post("/generate", json={**BODY, "prompt": ["w1", "w2"]})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert engine.queued == 2, "nothing of a refused request is queued"
        last = pool.submit(client.post, "/generate", json=BODY)
        gate.opened.set()
        assert first.result(20).status_code == last.result(20).status_code == 200
        for future in waiting:
            future.result(20)
    assert client.post("/generate", json={**BODY, "prompt": ["w1", "w2"]}).status_code == 200
    assert sample(client, "slr_rejections_total", reason="queue_full") == 1


def test_timeout(gated, gate):
    client = gated(request_timeout_s=2)
    response = client.post("/generate", json={**BODY, "n": 4})
    assert response.status_code == 504
    assert response.json()["error"] == {
        "type": "timeout_error",
        "message": "no answer within 2 seconds",
        "param": None,
        "code": "timeout",
    }
    gate.opened.set()
    while client.get("/readyz").status_code == 503:  # the batch that stood has to end
        time.sleep(0.001)
    assert client.post("/generate", json=BODY).status_code == 200
    assert sample(client, "slr_requests_total", endpoint="/generate", status="timeout") == 1
    assert sample(client, "slr_loop_iterations_count") < 5, "what had not begun was dropped"


def test_a_failing_engine_fails_its_request_and_goes_on(gated, gate, caplog):
    client = gated()
    gate.opened.set()
    gate.fail_next = True
    response = client.post("/generate", json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert client.post("/generate", json=BODY).status_code == 200
    assert client.get("/readyz").status_code == 200
    assert sample(client, "slr_requests_total", endpoint="/generate", status="error") == 1


def test_stopping_refuses_what_waits(gated, gate):
    client = gated()
    engine = client.app.state.service.check()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(client.post, "/generate", json={**BODY, "n": 4})]
        assert gate.reached.wait(20)
        closing = pool.submit(engine.close)
        while engine.alive:
            pass
        gate.opened.set()
        closing.result(20)
        assert [future.result(20).status_code for future in asked] == [503]
    assert client.post("/generate", json=BODY).status_code == 503


def test_a_client_that_leaves_takes_its_waiting_requests_with_it(reasoner, gate):
    made = tiny.twin(reasoner)
    left = asyncio.Event()
    sent = []

    async def receive_then_leave():
        if not receive_then_leave.asked:
            receive_then_leave.asked = True
            return {"type": "http.request", "body": json.dumps({**BODY, "n": 3}).encode(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    receive_then_leave.asked = False

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "http_version": "1.1",
    }

    async def scenario(engine):
        app = create_app(Settings(), engine)
        async with app.router.lifespan_context(app):
            running = engine.submit(tiny.request(made, "w1"))
            await asyncio.to_thread(gate.reached.wait, 20)
            request = asyncio.create_task(app(scope, receive_then_leave, send))
            while engine.queued < 3:
                await asyncio.sleep(0.001)
            left.set()
            await asyncio.wait_for(request, 20)
            gate.opened.set()
            await asyncio.wrap_future(running)
            value = app.state.service.metrics.registry.get_sample_value
            assert value("slr_requests_total", {"endpoint": "/generate", "status": "cancelled"}) == 1
            assert value("slr_loop_iterations_count") == 0, "none of its requests ran"

    with Engine(made) as engine:
        engine.model.base_model.register_forward_pre_hook(gate)
        asyncio.run(scenario(engine))
    # Nobody reads it, but the application ends every request in the same way.
    assert sent[0]["status"] == 499
