"""Keys, CORS, header and body limits, path traversal."""

import asyncio
import hashlib
import logging

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from slr_core.errors import ConfigError
from slr_server.app import create_app
from slr_server.auth import ApiKeys, KeyHashes
from slr_server.overload import BodyLimit
from slr_server.settings import ServerSettings
from tests.server.conftest import sample

KEY, OTHER, ADMIN = "k" * 20, "o" * 20, "a" * 20
BODY = {"prompt": "w1", "max_new_tokens": 1}
PROBES = ("/livez", "/readyz", "/startupz", "/health")
PROTECTED = [
    *(("POST", path) for path in ("/generate", "/trace", "/v1/completions", "/v1/chat/completions")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/prosqa", "/metrics", "/docs", "/openapi.json")),
    *(("GET", path) for path in ("/", "/version", "/static/docs.js", "/nope")),
]


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def served(engine):
    def build(**settings):
        return TestClient(create_app(ServerSettings(**settings), engine))

    return build


def test_keys_required(served):
    hashed = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()
    with served(api_keys=f"{KEY}, {hashed}", admin_key=ADMIN) as client:
        for path in PROBES:
            assert client.get(path).status_code == 200
        for method, path in PROTECTED:
            for headers in ({}, bearer("x" * 20), bearer(""), {"authorization": f"Basic {KEY}"}, bearer(hashed)):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            for key in (KEY, OTHER, ADMIN):
                assert client.request(method, path, headers=bearer(key)).status_code not in (401, 403)
        assert client.post("/generate", json=BODY, headers=bearer(KEY)).status_code == 200
        assert sample(client, "slr_requests_total", endpoint="/generate", status="rejected") > 0


def test_key_of_any_characters(served):
    """Of a key in UTF-8, the last byte may be a space in Latin-1."""
    for key in (
        "0123456789abcde\N{LATIN SMALL LETTER A WITH GRAVE}",
        "0123456789abcde\N{LATIN CAPITAL LETTER A WITH RING ABOVE}",
    ):
        with served(api_keys=key) as client:
            sent = [(b"authorization", b"Bearer  " + key.encode() + b" ")]
            assert client.get("/version", headers=sent).status_code == 200


def test_body_unread_without_key(served):
    def chunks():
        yield b"{"
        raise AssertionError("the body must not be read")

    with served(api_keys=KEY) as client:
        assert client.post("/generate", content=b"x" * (2 << 20)).status_code == 401


def test_admin_key(served):
    with served(api_keys=KEY, admin_key=ADMIN) as client:
        assert client.get("/admin/loop_sets").status_code == 401
        assert client.get("/admin/loop_sets", headers=bearer(KEY)).status_code == 401
        assert client.get("/admin/loop_sets", headers=bearer(ADMIN)).status_code == 200
    for settings in ({}, {"api_keys": KEY}):
        with served(**settings) as client:
            response = client.get("/admin/loop_sets", headers=bearer(KEY))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    with served(admin_key=ADMIN) as client:
        assert client.post("/generate", json=BODY).status_code == 200


def test_key_hashes(monkeypatch):
    settings = ServerSettings(api_keys=f"{KEY},{OTHER}")
    keys = KeyHashes(settings.api_keys)
    assert KEY not in str(vars(keys))
    assert KEY not in repr(settings)
    compared = []
    monkeypatch.setattr("slr_server.auth.hmac.compare_digest", lambda a, b: compared.append(len(a)) or a == b)
    assert keys.matches(KEY.encode())
    assert not keys.matches(KEY[:-1].encode())
    assert compared == [64] * 4, "all hashes are compared, also after a match"


@pytest.mark.parametrize("keys", ["short", "", ",", f"{KEY},short", "sha256:" + "0" * 63, f"sha256:{'g' * 64}"])
def test_short_keys(keys):
    with pytest.raises(ValidationError) as error:
        ServerSettings(api_keys=keys)
    assert KEY not in str(error.value)


def test_nothing_private_is_logged(served, caplog):
    caplog.set_level(logging.DEBUG)
    body = {"prompt": "w30 w4 w4 w17", "max_new_tokens": 6}
    with served(api_keys=KEY, admin_key=ADMIN) as client:
        (result,) = client.post("/generate", json=body, headers=bearer(KEY)).json()["results"]
        client.get("/admin/loop_sets", headers=bearer(ADMIN))
    logged = caplog.text + str([vars(record) for record in caplog.records if record.name.startswith(("slr", "server"))])
    assert len(result["text"]) > 5
    assert [text for text in (KEY, ADMIN, body["prompt"], result["text"]) if text in logged] == []


def test_cors_off_by_default(client):
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for response in (client.options("/generate", headers=origin), client.post("/generate", json=BODY, headers=origin)):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origins", ["https://a.example", "*"])
def test_cors_allows_client_headers(served, origins):
    asked = "authorization,content-type,x-stainless-lang,x-stainless-runtime-version,x-stainless-retry-count"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": asked}
    with served(cors_origins=origins, api_keys=KEY) as client:
        response = client.options("/v1/chat/completions", headers={"origin": "https://a.example", **preflight})
        assert response.status_code == 200
        allowed = response.headers["access-control-allow-headers"]
        assert allowed == "*" or set(asked.split(",")) <= set(allowed.replace(" ", "").split(","))
        assert "access-control-allow-credentials" not in response.headers
    with served(cors_origins="https://b.example") as client:
        response = client.options("/v1/chat/completions", headers={"origin": "https://a.example", **preflight})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "cors_refused"
        assert response.headers["x-request-id"]
        assert "access-control-allow-origin" not in response.headers
        assert sample(client, "slr_requests_total", endpoint="/v1/chat/completions", status="rejected") == 1


def test_cors_origins(served):
    with served(cors_origins="https://a.example,https://b.example", api_keys=KEY) as client:
        preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        response = client.options("/generate", headers={"origin": "https://b.example", **preflight})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://b.example"
        response = client.post("/generate", json=BODY, headers={"origin": "https://b.example", **bearer(KEY)})
        assert response.headers["access-control-allow-origin"] == "https://b.example"
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]
        response = client.options("/generate", headers={"origin": "https://evil.example", **preflight})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [{f"x-{i}": "1" for i in range(101)}, {"x": "y" * 33_000}, {"x" * 33_000: "y"}],
    ids=["many", "long", "name"],
)
def test_too_many_headers(client, headers):
    response = client.post("/generate", json=BODY, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
    assert client.post("/generate", json=BODY).status_code == 200


def test_body_timeout():
    sent = []

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    limit = BodyLimit(lambda *_: 1 / 0, limit=100, timeout_s=0.01)
    asyncio.run(limit({"type": "http", "method": "POST", "headers": []}, never, send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    "path", ["/../etc/passwd", "/%2e%2e/etc/passwd", "/generate/..%2f..", "/v1/models/..%2f..%2fetc", "//generate"]
)
def test_path_traversal(client, path):
    response = client.get(f"http://testserver{path}")  # absolute: a relative URL with two slashes would name a host
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "root:" not in response.text


def test_key_file(tmp_path, engine, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "keys"
    hashed = hashlib.sha256(OTHER.encode()).hexdigest()
    path.write_text(f"# clients\n{KEY}\n\nsha256:{hashed}\n")
    with TestClient(create_app(ServerSettings(api_keys="g" * 20, api_keys_file=str(path)), engine)) as client:

        def accepted():
            return [client.get("/version", headers=bearer(key)).status_code == 200 for key in (KEY, OTHER, "g" * 20)]

        assert client.get("/version").status_code == 401
        assert accepted() == [True, True, True]
        for fault in ("short\n", "", "sha256:12345678901234567890\n", "\0" * 20, f"{OTHER}\n" * 100_000):
            path.write_text(fault)
            client.app.state.api_keys.reload()
            assert caplog.records[-1].getMessage().endswith("the keys stay as they are")
            assert accepted() == [True, True, True]
        path.write_text(OTHER, encoding="utf-8-sig")  # with a byte order mark
        client.app.state.api_keys.reload()
        assert accepted() == [False, True, True]
    assert not any(key in caplog.text for key in (KEY, OTHER, hashed))


def test_key_file_without_keys(tmp_path):
    for path, told in ((tmp_path / "none", "is not a file"), (tmp_path, "is not a file")):
        with pytest.raises(ConfigError, match=told):
            ApiKeys(None, str(path))
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="every key must have at least 16 characters"):
        ApiKeys(None, str(tmp_path / "keys"))
