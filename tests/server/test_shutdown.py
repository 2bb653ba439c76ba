"""A server process ends on time, whatever signal comes and whatever blocks, and its output never blocks it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from tests.server import events
from tests.server.process import Server, default_hangup

pytestmark = pytest.mark.slow

ADMIN = "a" * 20
LONG = {"prompt": ["w1 w2"] * 4, "n": 4, "max_new_tokens": 40, "stream": True}


def timed_end(server, sig, limit):
    started = time.monotonic()
    server.process.send_signal(sig)
    assert server.process.wait(60) == 0, server.log.read_text()[-3000:]
    assert time.monotonic() - started < limit


def test_blocked_stderr(tiny_checkpoint):
    """A full pipe blocks neither requests nor the end."""
    log = tiny_checkpoint.parent / "unread"
    server = Server(tiny_checkpoint, log, "--log-level", "debug", stderr=subprocess.PIPE)
    try:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for _ in range(40):  # each line has more than 10,000 characters
                assert client.get("/nope" + "/" * 10_000).status_code == 404
        timed_end(server, signal.SIGTERM, 15)
    finally:
        server.kill()


def test_broken_stdout(tiny_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    reading, writing = os.pipe()
    os.close(reading)
    server = Server(tiny_checkpoint, tiny_checkpoint.parent / "broken", "--port", port, stdout=writing)
    os.close(writing)
    try:
        server.url = f"http://127.0.0.1:{port}"

        def ready():
            try:
                return httpx.get(f"{server.url}/readyz").status_code == 200
            except httpx.ConnectError:
                return False

        server.until(ready)
        time.sleep(0.3)
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        timed_end(server, signal.SIGTERM, 15)
    finally:
        server.kill()


def test_second_signal(tiny_checkpoint):
    """It ends at once, and a stream gets its last event."""
    server = Server(tiny_checkpoint, tiny_checkpoint.parent / "second", "--slots", "1", "--grace-s", "600")
    try:
        with ThreadPoolExecutor() as pool, httpx.stream("POST", f"{server.url}/generate", json=LONG) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            rest = pool.submit(lambda: [first, *_until_cut(lines)])
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: "shutting down" in server.log.read_text())
            timed_end(server, signal.SIGTERM, 10)
            last = events.of("\n".join(rest.result(20)))[-1]
        assert (last.name, last.data["error"]["code"]) == ("error", "unavailable")
    finally:
        server.kill()


def _until_cut(lines):
    with suppress(httpx.RemoteProtocolError):  # a stream that fails has no final chunk
        yield from lines


def test_hangup_drains_and_loads_stay_offline(tiny_checkpoint):
    """A hub id in a loop adapter set is not followed; SIGHUP ends the server as SIGTERM does."""
    folder = tiny_checkpoint.parent / "sets"
    shutil.copytree(tiny_checkpoint, folder / "online")
    shutil.rmtree(folder / "online" / "base")
    config = json.loads((folder / "online" / "slr_config.json").read_text())
    (folder / "online" / "slr_config.json").write_text(json.dumps({**config, "base": "nobody/such-model"}))
    flags = ("--loop-sets", str(folder), "--admin-key", ADMIN)
    with default_hangup():
        server = Server(tiny_checkpoint, tiny_checkpoint.parent / "hangup", *flags)
    try:
        started = time.monotonic()
        headers = {"authorization": f"Bearer {ADMIN}"}
        load = httpx.post(f"{server.url}/admin/loop_sets", json={"name": "online"}, headers=headers, timeout=60)
        assert load.status_code == 409
        assert time.monotonic() - started < 10
        with ThreadPoolExecutor() as pool:
            body = {"prompt": "w1", "max_new_tokens": 40}
            running = [pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=30) for _ in range(3)]
            timed_end(server, signal.SIGHUP, 20)
            assert all(each.done() for each in running)
    finally:
        server.kill()
