import threading
import time
from concurrent.futures import ThreadPoolExecutor

from fastapi.testclient import TestClient

from slr_server import service
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server.conftest import sample

BODY = {"prompt": "w1 w2", "max_new_tokens": 2}


def test_full_queue(gated, gate):
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
        assert engine.queued == 2, "a refused request is not queued at all"
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
    while client.get("/readyz").status_code == 503:  # until the blocked batch has finished
        time.sleep(0.001)
    assert client.post("/generate", json=BODY).status_code == 200
    assert sample(client, "slr_requests_total", endpoint="/generate", status="timeout") == 1
    assert sample(client, "slr_loop_exits_total", reason="cancelled") == 0, "no client has left"
    assert sample(client, "slr_loop_iterations_count") < 5, "requests that had not started were dropped"


def test_failing_request(gated, gate, caplog):
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


def test_stopping_engine(gated, gate):
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


def test_tokenizing_does_not_block(client, monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    preprocess = service.preprocess

    def slowly(job, *rest):
        if job.n == 2:
            begun.set()
            assert ended.wait(20)
        return preprocess(job, *rest)

    monkeypatch.setattr(service, "preprocess", slowly)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(client.post, "/generate", json={**BODY, "n": 2})
        assert begun.wait(20)
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        ended.set()
        assert slow.result(20).status_code == 200


def test_timeout_while_tokenizing(engine, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(service, "preprocess", lambda *_: ended.wait(20))
    with TestClient(create_app(ServerSettings(request_timeout_s=0.05), engine)) as client:
        assert client.post("/generate", json=BODY).status_code == 504
        ended.set()
