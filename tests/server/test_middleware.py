import logging
from pathlib import Path

import pytest

import slr_server
from tests.server.conftest import sample


@pytest.mark.parametrize("given", ["abc-1.2:3_4", "x" * 128])
def test_valid_request_id_is_kept(client, given):
    assert client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>", "a\tb"])
def test_invalid_request_id_is_replaced(client, given):
    made = client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]
    assert len(made) == 32
    assert made != client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"]


def test_request_id_of_errors(client):
    response = client.post("/generate", content=b"x" * (2 << 20), headers={"x-request-id": "big"})
    assert (response.status_code, response.headers["x-request-id"]) == (413, "big")


def test_log_line(client, caplog):
    caplog.set_level(logging.INFO, "slr.access")
    client.post("/generate", json={"prompt": "w1"}, headers={"x-request-id": "one"})
    client.get("/a%0Ab", headers={"x-request-id": "two"})
    one, two = (record.fields for record in caplog.records if record.name == "slr.access")
    assert (one["method"], one["path"], one["status"], one["request_id"]) == ("POST", "/generate", 200, "one")
    assert (one["answers"], one["stream"], one["prompt_tokens"]) == (1, False, 1)
    assert len(one["iterations"]) == len(one["exit_reasons"]) == 1
    assert one["loop_s"] > 0
    assert (two["path"], two["status"], two["error"]) == ("/a%0Ab", 404, "not_found")


def test_body_without_length(client):
    def chunks(size):
        for _ in range(size >> 16):
            yield b" " * (1 << 16)
        yield b'{"prompt": "w1"}'

    headers = {"content-type": "application/json"}
    assert client.post("/generate", content=chunks(1 << 19), headers=headers).status_code == 200
    response = client.post("/generate", content=chunks(1 << 21), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_unexpected_error(client, monkeypatch, caplog):
    monkeypatch.setattr("slr_server.routes.common.check_limits", lambda *_: 1 / 0)
    response = client.post("/generate", json={"prompt": "w1"}, headers={"x-request-id": "odd"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "odd"
    assert response.json()["error"]["code"] == "internal_error"
    assert "division" not in response.text
    assert "request odd failed" in caplog.text
    assert "division by zero" in caplog.text
    assert sample(client, "slr_requests_total", endpoint="/generate", status="error") == 1
    monkeypatch.undo()
    assert client.post("/generate", json={"prompt": "w1"}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/version", "/metrics", "/docs", "/v1/models", "/", "/nope"])
def test_head(client, path):
    got, asked = client.get(path), client.head(path)
    assert asked.status_code == got.status_code
    assert asked.content == b""
    assert asked.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("given", ["x", "bytes=a-b", "bytes=9999999-", "bytes=0-1"])
def test_range_is_ignored(client, given):
    response = client.get("/docs", headers={"range": given})
    assert (response.status_code, response.content) == (200, client.get("/docs").content)


def test_head_of_post(client):
    response = client.head("/generate")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert client.post("/version").headers["allow"] == "GET, HEAD"


def test_plain_asgi():
    # Starlette's own base class runs the handler in another task, which never sees a disconnect.
    sources = [path.read_text() for path in Path(slr_server.__file__).parent.rglob("*.py")]
    assert not any("BaseHTTPMiddleware" in source or '.middleware("http")' in source for source in sources)
