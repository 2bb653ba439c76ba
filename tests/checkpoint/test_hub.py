"""Models on the hub, which a server beside the test plays: what is asked of it, and in which order."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slr_core.checkpoint.hub import find_file
from slr_core.errors import CheckpointError
from tests import tiny

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Serves the folders below ``root`` as models, and records the paths asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.paths = root, []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def files(self):
        """The files asked for, each once, without the model's name."""
        asked = (re.search(r"/resolve/[^/]+/(.+)", path) for path in self.paths)
        return list(dict.fromkeys(found[1] for found in asked if found))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        model, _, name = (
            self.path.partition("?")[0].lstrip("/").replace(f"/{COMMIT}/", "/main/").partition("/resolve/main/")
        )
        if model.startswith("api/models/"):
            self._describe(model.removeprefix("api/models/"))
            return
        path = self.server.root / model / name
        if path.is_file():
            self._send(200, path.read_bytes(), {"ETag": f'"{path.stat().st_size}-{name}"', "X-Repo-Commit": COMMIT})
        else:
            missing = "EntryNotFound" if (self.server.root / model).is_dir() else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": missing, "X-Error-Message": "not found", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _describe(self, what):
        model, _, rest = what.partition("/tree/")
        files = [
            {"type": "file", "path": file.name, "size": 1, "oid": "0"} for file in (self.server.root / model).glob("*")
        ]
        siblings = [{"rfilename": file["path"]} for file in files]
        body = files if rest else {"id": model, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def slr(hub, tmp_path):
    """Run ``slr`` with this hub and an empty cache: exit code and errors."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "slr_core.cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stderr

    return run


def publish(hub, model, **changes):
    folder = hub.root / model
    tiny.base().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    if changes:
        tiny.edit_json(folder / "config.json", **changes)


@pytest.mark.slow
def test_unknown_id(hub, slr):
    """One question to the hub, one line to the user."""
    hub.root.mkdir()
    code, err = slr("init", "someone/nothing", "--out", "out")
    assert (code, err) == (1, "slr: someone/nothing: no such folder, and no such model on the hub\n")
    assert hub.files == ["slr_config.json"]


@pytest.mark.slow
def test_config_before_weights(hub, slr):
    """A model that cannot be a base is refused by its config; none of its weights are downloaded."""
    publish(hub, "someone/windowed", layer_types=["sliding_attention", "full_attention"])
    code, err = slr("init", "someone/windowed", "--out", "out")
    assert code == 1
    assert "someone/windowed (llama): layers without full attention are not supported" in err
    assert set(hub.files) == {"slr_config.json", "config.json"}


@pytest.mark.slow
def test_plain_model(hub, slr):
    """Served or asked, a plain model is refused by its config, with the command that makes a reasoner of it."""
    publish(hub, "someone/plain")
    code, err = slr("generate", "--model", "someone/plain", "hello")
    assert (code, set(hub.files)) == (1, {"slr_config.json", "config.json"})
    assert err == (
        "slr: someone/plain: a plain transformers model: "
        "`slr init someone/plain --out DIR` makes a latent reasoner of it\n"
    )


@pytest.mark.slow
def test_base_is_downloaded(hub, slr, tmp_path):
    publish(hub, "someone/plain")
    code, err = slr("init", "someone/plain", "--out", "out")
    assert code == 0, err
    assert "Loading weights" not in err
    assert hub.files[:2] == ["slr_config.json", "config.json"]
    assert "model.safetensors" in hub.files
    assert json.loads((tmp_path / "out" / "slr_config.json").read_text())["base"] == "base"


@pytest.mark.parametrize("name", ["no-such/model", "nothing"])
def test_offline(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"^{name}: no such folder, and not a model on the hub that can be reached"
    ):
        find_file(name, "config.json")


def test_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        find_file(str(tmp_path / "model"), "config.json")
