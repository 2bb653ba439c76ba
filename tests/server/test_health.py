import time

import pytest
from fastapi.testclient import TestClient

from slr_core._version import __version__
from slr_core.engine import Engine
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny


def test_ready(client):
    assert client.get("/livez").json() == {"status": "alive"}
    ready = client.get("/readyz").json()
    assert ready.pop("status") == "ready"
    assert ready.pop("tokenizer_lag_s") == 0
    assert 0 <= ready.pop("event_loop_lag_s") < 10
    assert not ready
    assert client.get("/startupz").json() == {"status": "started"}
    assert client.get("/health").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": __version__}


def refused(client: TestClient, message: str, live: int = 200) -> None:
    for response in (client.get("/readyz"), client.get("/health"), client.post("/generate", json={"prompt": "w1"})):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        assert message in response.json()["error"]["message"]
    assert client.get("/livez").status_code == live


def test_stopped_engine(reasoner):
    engine = Engine(tiny.twin(reasoner), threads=1)
    with TestClient(create_app(ServerSettings(), engine)) as client:
        engine.close()
        refused(client, "stopped")


def test_stalled_engine(gated, gate):
    client = gated(request_timeout_s=0.2, stall_timeout_s=2)
    assert client.post("/generate", json={"prompt": "w1"}).status_code == 504
    assert client.get("/livez").status_code == 200
    deadline = time.monotonic() + 20
    while client.get("/livez").status_code == 200 and time.monotonic() < deadline:
        pass
    refused(client, "no progress", live=503)
    gate.opened.set()
    while client.get("/livez").status_code == 503 and time.monotonic() < deadline:
        pass
    assert client.get("/readyz").status_code == 200


def test_loading(monkeypatch, reasoner, gate):
    engine = Engine(tiny.twin(reasoner), threads=1)

    def load(*_, **__):
        gate()
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", load)
    with TestClient(create_app(ServerSettings(threads=1))) as client:
        refused(client, "loading")
        assert client.get("/startupz").status_code == 503
        gate.opened.set()
        service = client.app.state.service
        client.portal.call(lambda: service.loading)
        assert engine.counters.tokens == 1, "it has generated a first answer"
        assert client.get("/startupz").status_code == 200
        assert client.get("/readyz").status_code == 200
    assert not engine.alive, "the application closes its own engine"


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_failed_load(monkeypatch, kind):
    def load(*_, **__):
        raise kind("nope")

    monkeypatch.setattr(Engine, "from_pretrained", load)
    with TestClient(create_app(ServerSettings())) as client:
        client.portal.call(lambda: client.app.state.service.loading)
        refused(client, "could not be loaded")
        assert isinstance(client.app.state.service.failure, kind)


def test_given_engine_stays_open(client, engine):
    with TestClient(create_app(ServerSettings(), engine)):
        pass
    assert engine.alive
