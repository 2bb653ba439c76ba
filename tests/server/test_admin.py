"""Loop adapter sets that are loaded and removed while requests run."""

import asyncio
import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from slr_server import service, threads
from slr_server.adapter_sets import AdapterSetFolder
from slr_server.app import create_app
from slr_server.errors import Unavailable
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events

ADMIN = "a" * 20
HEADERS = {"authorization": f"Bearer {ADMIN}"}
BODY = {"prompt": tiny.PROMPTS[1], "max_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reasoner):
    """A set on the same base, one on another base, an empty folder and a file."""
    folder = tmp_path_factory.mktemp("loop_sets")
    other = tiny.twin(reasoner)
    tiny.shake(other, seed=7)
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.tokenizer.chat_template = "{{ messages[0].content }}"
    other.save_pretrained(str(folder / "other"))
    tiny.reasoner(seed=5).save_pretrained(str(folder / "stranger"))
    (folder / "junk").mkdir()
    (folder / "file").write_text("x")
    return folder


@pytest.fixture(scope="module")
def chatty(reasoner):
    """The same model with a chat template."""
    text = reasoner.config.text.model_copy(update={"chat_template": "{{ messages[0].content }}", "max_new_tokens": 2})
    made = tiny.twin(reasoner)
    made.config = made.config.model_copy(update={"text": text})
    return made


@pytest.fixture
def client(reasoner, folder):
    settings = ServerSettings(admin_key=ADMIN, loop_sets=str(folder))
    with Engine(reasoner, threads=1) as engine, TestClient(create_app(settings, engine)) as client:
        yield client


def load(client, name):
    return client.post("/admin/loop_sets", json={"name": name}, headers=HEADERS)


def text(client, **more):
    return client.post("/generate", json={**BODY, **more}).json()["results"][0]["text"]


def test_load_serve_remove(client, reasoner, folder):
    assert client.get("/admin/loop_sets", headers=HEADERS).json() == {
        "loaded": ["prosqa"],
        "available": ["junk", "other", "stranger"],
    }
    own = text(client)
    assert load(client, "other").json()["loaded"] == ["prosqa", "other"]
    other = type(reasoner).from_pretrained(str(folder / "other"))
    (expected,) = generate(other, [tiny.request(other, BODY["prompt"])])
    assert text(client, loop_set="other") == expected.text != own
    assert text(client) == own
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["prosqa", "other"]
    completion = {"model": "other", "prompt": BODY["prompt"], "temperature": 0, "max_tokens": 6}
    answer = client.post("/v1/completions", json=completion).json()
    assert (answer["model"], answer["choices"][0]["text"]) == ("other", expected.text)
    removed = client.delete("/admin/loop_sets/other", headers=HEADERS)
    assert removed.json()["loaded"] == ["prosqa"]
    refused = client.post("/generate", json={**BODY, "loop_set": "other"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loop_set")
    assert client.post("/v1/completions", json=completion).status_code == 404
    assert load(client, "other").status_code == 200, "it can be loaded again"


def named(client, path, name=None, stream=False):
    """The ``model`` of an answer, whole or in every chunk of a stream."""
    field = "model" if path.startswith("/v1") else "loop_set"
    prompt = {"messages": [{"role": "user", "content": "w1"}]} if "chat" in path else {"prompt": "w1"}
    response = client.post(path, json={**prompt, field: name, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["model"]
    told = [event.data for event in events.of(response.text)]
    (model,) = {data["model"] for data in told if "model" in data}
    return model


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/trace", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("served", ["prosqa", "org/name"])
def test_answers_name_their_loop_set(chatty, folder, caplog, path, stream, served):
    caplog.set_level("INFO", "slr.access")
    settings = ServerSettings(admin_key=ADMIN, loop_sets=str(folder), served_model_name=served)
    with Engine(chatty, threads=1) as engine, TestClient(create_app(settings, engine)) as client:
        assert load(client, "other").status_code == 200
        assert [named(client, path, name, stream) for name in (None, served, "other")] == [served, served, "other"]
        assert client.get("/admin/loop_sets", headers=HEADERS).json()["loaded"] == [served, "other"]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [served, "other"]
        assert client.get(f"/v1/models/{served}").json()["id"] == served
    logged = [r.fields["loop_set"] for r in caplog.records if r.name == "slr.access" and "loop_set" in r.fields]
    assert logged == [served, served, "other"]


@pytest.mark.parametrize("path", ["/generate", "/trace"])
def test_unknown_loop_sets(client, path):
    assert load(client, "other").status_code == 200
    for name in ("default", "nope", "../other"):
        error = client.post(path, json={"prompt": "w1", "loop_set": name}).json()["error"]
        assert (error["param"], error["code"]) == ("loop_set", "invalid_value")
        assert error["message"] == f"loop_set must be one of prosqa, other, got {name}"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("stranger", 409), ("junk", 409), ("default", 409), ("prosqa", 409)),
        *(("nope", 404), ("file", 404), ("..", 400), ("../other", 400), ("/etc", 400), ("", 400), (3, 400)),
    ],
)
def test_refused_loads(client, folder, name, status):
    response = load(client, name)
    assert response.status_code == status, response.text
    assert str(folder) not in response.text
    assert text(client)


@pytest.mark.parametrize(
    ("name", "status"), [("default", 409), ("prosqa", 409), ("nope", 404), ("..%2fother", 404), ("a b", 400)]
)
def test_refused_removals(client, name, status):
    assert client.delete(f"/admin/loop_sets/{name}", headers=HEADERS).status_code == status


def test_twice(client):
    assert load(client, "other").status_code == 200
    assert load(client, "other").status_code == 409


def test_load_without_folder(engine):
    with TestClient(create_app(ServerSettings(admin_key=ADMIN), engine)) as client:
        assert load(client, "other").status_code == 404
        assert client.get("/admin/loop_sets", headers=HEADERS).json()["available"] == []


@pytest.fixture
def slow_load(monkeypatch):
    """Loads last until the event is set."""
    ended = threading.Event()
    load_loop_set = Engine.load_loop_set

    def slowly(engine, name, path):
        assert ended.wait(20)
        load_loop_set(engine, name, path)

    monkeypatch.setattr(Engine, "load_loop_set", slowly)
    yield ended
    ended.set()


def test_load_has_a_time_limit(reasoner, folder, slow_load):
    settings = ServerSettings(admin_key=ADMIN, loop_sets=str(folder), load_timeout_s=0.1)
    with Engine(reasoner, threads=1) as engine, TestClient(create_app(settings, engine)) as client:
        assert load(client, "other").status_code == 504
        refused = load(client, "other")
        assert (refused.status_code, "has not ended yet" in refused.text) == (409, True)
        slow_load.set()
        deadline = time.monotonic() + 20
        while threads.unfinished():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert list(engine.loop_sets) == ["default"], "it is removed again"


def test_load_does_not_hold_up_the_end(reasoner, folder, slow_load):
    async def scenario(engine):
        app = create_app(ServerSettings(admin_key=ADMIN, loop_sets=str(folder)), engine)
        async with app.router.lifespan_context(app):
            service = app.state.service
            loading = asyncio.create_task(service.load_loop_set("other"))
            while not threads.unfinished():
                await asyncio.sleep(0.001)
            service.drain()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(loading, 10)
            await asyncio.wait_for(service.draining, 10)

    with Engine(reasoner, threads=1) as engine:
        asyncio.run(scenario(engine))
        slow_load.set()


def test_name_resolves_once(client, reasoner, folder, tmp_path, monkeypatch):
    # Replaced under its name while the request's prompt waits to be tokenized.
    other = type(reasoner).from_pretrained(str(folder / "other"))
    third = tiny.twin(reasoner)
    tiny.shake(third, seed=8)
    third.save_pretrained(str(tmp_path / "third"))
    engine, preprocess = client.app.state.service.check(), service.preprocess
    begun, replaced = threading.Event(), threading.Event()

    def wait(*arguments):
        begun.set()
        assert replaced.wait(20)
        return preprocess(*arguments)

    assert load(client, "other").status_code == 200
    monkeypatch.setattr(service, "preprocess", wait)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(text, client, loop_set="other")
        assert begun.wait(20)
        engine.remove_loop_set("other")
        engine.load_loop_set("other", str(tmp_path / "third"))
        replaced.set()
        old, new = waiting.result(20), text(client, loop_set="other")
    assert [old, new] == [generate(made, [tiny.request(made, BODY["prompt"])])[0].text for made in (other, third)]
    assert old != new


def test_names_that_cannot_be_loaded_are_not_listed(tmp_path):
    for name in ("good", "-dash", "with space", "line\nbreak", "\u202e", "x" * 65):
        (tmp_path / name).mkdir()
    assert AdapterSetFolder(str(tmp_path), 1.0).available() == ["good"]
