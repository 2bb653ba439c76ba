"""The page without a browser: who gets it, its policy, its size, and that the built files belong to the sources."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from slr_core.checkpoint.folder import BUNDLED_FOLDER, bundled_names
from slr_core.checkpoint.validate import checkpoint_sha256
from slr_core.evaluation.run import identify_model
from slr_server.app import create_app
from slr_server.protocol.operation import CheckpointInfo
from slr_server.routes import page
from slr_server.routes.page import read_examples
from slr_server.settings import ServerSettings

PAGE = Path(__file__).parents[3] / "server" / "page"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEY = "k" * 20
FIRST_LOAD_BYTES = 300_000


@pytest.fixture
def client(shared_client):
    return shared_client


@pytest.mark.parametrize("accept", ["application/json", "*/*"])
def test_index_stays_json(client, accept):
    response = client.get("/", headers={"accept": accept})
    assert response.json()["docs"] == "/docs"


def test_page_for_browsers(client):
    response = client.get("/", headers=BROWSER)
    assert response.headers["content-type"].startswith("text/html")
    assert response.headers["vary"] == "Accept"
    directives = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
    assert "unsafe" not in str(directives)
    assert "http" not in str(directives)


def test_page_needs_no_key(engine):
    with TestClient(create_app(ServerSettings(api_keys=KEY), engine)) as client:
        assert client.get("/", headers=BROWSER).status_code == 200
        assert client.get("/page/page.js").status_code == 200
        assert client.post("/", headers=BROWSER).status_code == 401
        for path in ("/", "/checkpoint", "/page"):
            assert client.get(path).status_code == 401
        for path in ("/page/../checkpoint", "/page/%2e%2e/checkpoint", "/page/../../auth.py"):
            assert client.get(path, headers=BROWSER).status_code in (401, 404)
        assert client.get("/checkpoint", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_checkpoint(client):
    info = CheckpointInfo.model_validate_json(client.get("/checkpoint").content, strict=True)
    assert info.models == [info.model] == ["prosqa"]
    assert (info.workspace, info.positions, info.hidden_size) == ("append", 1, 32)
    assert not {"learned", "survival", "end_token"} & set(info.criteria), "this checkpoint cannot measure them"
    assert info.criterion in info.criteria


def test_checkpoint_is_read_once(engine, monkeypatch):
    read = []
    monkeypatch.setattr(page, "read_examples", lambda folder: read.append(folder) or [])
    monkeypatch.setattr(page, "reads_chats", lambda reasoner: read.append(reasoner) or True)
    with TestClient(create_app(ServerSettings(), engine)) as client:
        answers = [client.get("/checkpoint").json() for _ in range(3)]
    assert answers[0]["chat"]
    assert answers == answers[:1] * 3
    assert len(read) == 2


def test_identity_is_that_of_the_served_files(engine, monkeypatch):
    hashed = []
    monkeypatch.setattr(page, "checkpoint_sha256", lambda folder: hashed.append(folder) or checkpoint_sha256(folder))
    with TestClient(create_app(ServerSettings(model="prontoqa"), engine)) as client:
        answers = [client.get("/checkpoint/identity").json() for _ in range(3)]
    known = identify_model("prontoqa")["sha256"]
    assert answers == [{"sha256": known, "dtype": "float32", "quantization": "none"}] * 3
    assert hashed == [BUNDLED_FOLDER / "prontoqa"], "once, however many ask"
    with TestClient(create_app(ServerSettings(model="owner/name"), engine)) as client:
        assert client.get("/checkpoint/identity").json()["sha256"] is None


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_examples(name):
    assert len(read_examples(BUNDLED_FOLDER / name)) >= 4


def test_unusable_examples(tmp_path, caplog):
    file = tmp_path / "examples.json"
    assert read_examples(tmp_path) == []
    wrong = ("{", "3", "[3]", '[{"answer": "no prompt"}]', '[{"prompt": 3}]', "[" * 100_000)
    many = '[{"prompt": "a"}' + ', {"prompt": 3}' * 300 + "]"
    for content in (*wrong, '[{"prompt": "\\ud800"}]', many, many.replace("3", '"b"')):
        file.write_text(content)
        assert read_examples(tmp_path) == []
        assert "is not a list of examples" in caplog.text
        assert caplog.text.count("\n") == 1
        caplog.clear()
    file.unlink()
    os.mkfifo(file)
    assert read_examples(tmp_path) == []


def test_built_from_these_sources():
    digest = hashlib.sha256()
    names = sorted(f"src/{file.name}" for file in (PAGE / "src").iterdir())
    for name in (*names, "build.mjs", "package-lock.json"):
        digest.update(f"{name}\n".encode())
        digest.update((PAGE / name).read_bytes())
    assert (PAGE / "dist" / "sources.sha256").read_text().strip() == digest.hexdigest(), "run `make page`"


def test_first_load_size():
    files = [PAGE / "dist" / name for name in ("index.html", "page.js", "page.css")]
    assert sum(file.stat().st_size for file in files) < FIRST_LOAD_BYTES, "the server does not compress"
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) < FIRST_LOAD_BYTES / 3


def test_lock_names_no_host():
    packages = json.loads((PAGE / "package-lock.json").read_text())["packages"]
    assert all("resolved" not in package for package in packages.values())
