"""Disconnects, engine faults, shutdown: nothing leaks, and other requests are not affected."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from slr_core.generation.reference import generate
from tests import tiny
from tests.server import events
from tests.server.process import Server

pytestmark = pytest.mark.slow
ADMIN = "a" * 20
PHASES = ("prefill", "loop", "decode")


CONNECTIONS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _closed():
    yield
    while CONNECTIONS:
        CONNECTIONS.pop().close()


class Hold:
    """Controls the engine of ``tests/server/frozen.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def freeze(self, phase: str) -> None:
        (self.folder / f"reached-{phase}").unlink(missing_ok=True)
        (self.folder / f"freeze-{phase}").touch()

    def thaw(self) -> None:
        for file in self.folder.glob("freeze-*"):
            file.unlink()

    def reached(self, phase: str) -> bool:
        return (self.folder / f"reached-{phase}").exists()

    def fail(self, phase: str) -> None:
        (self.folder / f"fail-{phase}").touch()


@pytest.fixture(scope="module")
def made():
    # The workspace `block` has a closing pass too, so every phase of the engine occurs.
    return tiny.reasoner(loop=tiny.WORKSPACES["block"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, made):
    root = tmp_path_factory.mktemp("chaos")
    made.save_pretrained(str(root / "tiny"))
    poisoned = tiny.twin(made)
    with torch.no_grad():
        for name, parameter in poisoned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e38)  # finite, but its products are not
    (root / "sets").mkdir()
    poisoned.save_pretrained(str(root / "sets" / "poisoned"))
    return root


@pytest.fixture
def hold(tmp_path):
    return Hold(tmp_path)


@pytest.fixture
def start(folders, hold, tmp_path):
    started = []

    def build(*flags):
        flags = (
            "--slots",
            "3",
            "--admin-key",
            ADMIN,
            "--elastic-floor",
            "1",
            "--loop-sets",
            str(folders / "sets"),
            *flags,
        )
        module = "tests.server.frozen"
        log = tmp_path / f"log{len(started)}"
        started.append(Server(folders / "tiny", log, *flags, module=module, SLR_TEST_FREEZE=str(hold.folder)))
        return started[-1]

    yield build
    hold.thaw()
    for server in started:
        server.kill()


def connect(server, body, path="/generate"):
    """A request over a plain socket, which can be closed at any time."""
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=60)
    CONNECTIONS.append(connection)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


class Bystanders:
    """Concurrent requests whose answers must be those of the reference."""

    def __init__(self, made, server) -> None:
        self.server = server
        self.pool = ThreadPoolExecutor(4)
        self.expected = {p: generate(made, [tiny.request(made, p)])[0].text for p in tiny.PROMPTS[:4]}

    def ask(self):
        def one(prompt):
            body = {"prompt": prompt, "max_new_tokens": 6}
            return httpx.post(f"{self.server.url}/generate", json=body, timeout=60).json()["results"][0]["text"]

        return {prompt: self.pool.submit(one, prompt) for prompt in self.expected}

    def check(self, asked) -> None:
        assert {prompt: future.result(60) for prompt, future in asked.items()} == self.expected


BODY = {"prompt": "w1 w2 w3", "max_new_tokens": 30, "convergence": {"criterion": "fixed"}}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("streamed", [False, True])
def test_disconnect_in_any_phase(start, hold, made, path, streamed):
    server = start()
    bystanders = Bystanders(made, server)
    bystanders.check(bystanders.ask())
    server.idle()
    descriptors = server.descriptors
    cancelled = f"slr_requests_total{{{path},cancelled}}"
    for count, phase in enumerate((*PHASES, "close", "queued"), 1):
        frozen = "loop" if phase == "queued" else phase
        hold.freeze(frozen)
        body = {
            "prompt": BODY["prompt"],
            "stream": streamed,
            "temperature": 0,  # a sampled answer may end with its first token
            **({"max_tokens": 30} if path[1] == "v" else {"max_new_tokens": 30}),
        }
        dying = [connect(server, {**body, "n": 5 if phase == "queued" else 1}, path) for _ in range(2)]
        server.until(lambda frozen=frozen: hold.reached(frozen))
        if phase == "queued":
            server.until(lambda: server.metrics()["slr_requests_queued"] >= 7)
        asked = bystanders.ask()
        for connection in dying:
            connection.close()
        # While the engine is blocked: a request that goes on may be answered before its disconnect is seen.
        server.until(lambda count=count: server.metrics()[cancelled] == 2 * count)
        hold.thaw()
        bystanders.check(asked)
        server.idle()
    assert server.metrics()[cancelled] == 10
    server.until(lambda: server.descriptors <= descriptors)
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_disconnect_while_streaming(start, hold, made):
    server = start()
    bystanders = Bystanders(made, server)
    hold.freeze("decode")
    connection = connect(server, {**BODY, "stream": True})
    heard = b""
    while b"event: iteration" not in heard:
        heard += connection.recv(4096)
    asked = bystanders.ask()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, as after a crash
    connection.close()
    hold.thaw()
    bystanders.check(asked)
    server.idle()
    assert server.metrics()["slr_requests_total{/generate,cancelled}"] == 1


def test_slow_reader_is_dropped(start, made):
    server = start("--write-timeout-s", "1", "--max-prompts", "64", "--max-answers", "192")
    bystanders = Bystanders(made, server)
    connection = connect(
        server,
        {
            "prompt": ["w1 w2"] * 64,
            "n": 3,
            "max_new_tokens": 40,
            "top_tokens": 40,
            "stream": True,
            "include_states": True,
        },
        "/trace",
    )
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bystanders.check(bystanders.ask())
    server.idle()
    assert server.metrics()["slr_requests_total{/trace,cancelled}"] == 1
    connection.close()


@pytest.mark.parametrize("phase", PHASES)
def test_fault_in_step(start, hold, made, phase):
    server = start()
    bystanders = Bystanders(made, server)
    hold.freeze(phase)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(httpx.post, f"{server.url}/generate", json=BODY, timeout=60)
        server.until(lambda: hold.reached(phase))
        hold.fail(phase)
        hold.thaw()
        answer = asked.result(60)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    bystanders.check(bystanders.ask())
    server.idle()
    assert f"secret fault in {phase}" in server.log.read_text()
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def collect(response, parts):
    for part in response.iter_text():
        parts.append(part)


def test_fault_in_stream(start, hold):
    server = start()
    hold.freeze("decode")
    with httpx.stream("POST", f"{server.url}/generate", json={**BODY, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        hold.fail("decode")
        hold.thaw()
        parts = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            collect(response, parts)
    assert [event.name for event in events.of("".join(parts))][-1] == "error"
    server.idle()


def test_non_finite_loop_set(start, made):
    server = start()
    headers = {"authorization": f"Bearer {ADMIN}"}
    loaded = httpx.post(f"{server.url}/admin/loop_sets", json={"name": "poisoned"}, headers=headers, timeout=60)
    assert loaded.status_code == 200, loaded.text
    bystanders = Bystanders(made, server)
    with ThreadPoolExecutor() as pool:
        body = {**BODY, "loop_set": "poisoned", "n": 3}
        poisoned = pool.submit(httpx.post, f"{server.url}/trace", json=body, timeout=60)
        asked = bystanders.ask()
        answer = poisoned.result(60)
        bystanders.check(asked)
    assert answer.status_code == 200
    assert {result["exit_reason"] for result in answer.json()["results"]} == {"diverged"}
    for _ in range(3):
        bystanders.check(bystanders.ask())  # in the slots of the poisoned requests
    server.idle()
    assert server.metrics()["slr_loop_exits_total{diverged}"] == 3


def test_large_request_takes_turns(start, hold):
    server = start("--elastic-floor", "0.5")
    hold.freeze("loop")
    with ThreadPoolExecutor() as pool:

        def ask(**more):
            sent = time.time()
            answer = httpx.post(f"{server.url}/generate", json={**BODY, **more}, timeout=60)
            return sent, answer.json()["results"]

        large = pool.submit(ask, prompt=["w1", "w2", "w3", "w4"], n=16)
        server.until(lambda: server.metrics()["slr_requests_queued"] == 61)
        single = pool.submit(ask)
        server.until(lambda: server.metrics()["slr_requests_queued"] == 62)
        hold.thaw()
        (sent, (answer,)), (large_sent, answers) = single.result(60), large.result(60)
    begun = sorted(large_sent + other["timings"]["queue_s"] for other in answers)
    before = sum(at < sent + answer["timings"]["queue_s"] for at in begun)
    assert before <= 16, "without turns, 61 come first"
    assert (answer["iterations"], answer["budget_reduced"]) == (5, False)


def test_name_resolves_once(start, hold, folders, made):
    made_by = {}
    for seed, name in enumerate(("first", "second"), 7):
        made_by[name] = tiny.twin(made)
        tiny.shake(made_by[name], seed=seed)
        text = made.config.text.model_copy(update={"prompt_prefix": tiny.words(seed) + " "})
        made_by[name].config = made.config.model_copy(update={"text": text})
        made_by[name].save_pretrained(str(folders / name))
    server, headers = start(), {"authorization": f"Bearer {ADMIN}"}

    def serve(name):
        (folders / name).rename(folders / "sets" / "named")
        loaded = httpx.post(f"{server.url}/admin/loop_sets", json={"name": "named"}, headers=headers, timeout=60)
        assert loaded.status_code == 200, loaded.text

    def ask():
        body = {"prompt": tiny.PROMPTS[1], "max_new_tokens": 6, "loop_set": "named"}
        return httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["results"][0]["text"]

    serve("first")
    hold.freeze("tokenize")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask)
        server.until(lambda: hold.reached("tokenize"))
        removed = httpx.delete(f"{server.url}/admin/loop_sets/named", headers=headers, timeout=60)
        assert removed.status_code == 200
        (folders / "sets" / "named").rename(folders / "first")
        serve("second")
        hold.thaw()
        answers = [waiting.result(60), ask()]
    (folders / "sets" / "named").rename(folders / "second")
    expected = [generate(each, [tiny.request(each, tiny.PROMPTS[1])])[0].text for each in made_by.values()]
    assert answers == expected
    assert expected[0] != expected[1]


def test_sigterm_under_load(start, hold, made):
    server = start("--grace-s", "60")
    bystanders = Bystanders(made, server)
    hold.freeze("loop")
    with ThreadPoolExecutor(16) as pool:

        def ask(body):
            return httpx.post(f"{server.url}/generate", json=body, timeout=60)

        running = [pool.submit(ask, {"prompt": p, "max_new_tokens": 6}) for p in list(bystanders.expected)[:3]]
        server.until(lambda: hold.reached("loop"))
        streamed = connect(server, {**BODY, "stream": True})
        waiting = [pool.submit(ask, BODY) for _ in range(5)]
        server.until(lambda: server.metrics()["slr_requests_queued"] + server.metrics()["slr_slots_in_use"] == 9)
        in_slots = int(server.metrics()["slr_slots_in_use"])
        server.process.terminate()
        server.until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        assert httpx.get(f"{server.url}/livez").status_code == 200
        late = ask(BODY)
        assert (late.status_code, late.json()["error"]["message"]) == (503, "the server is shutting down")
        hold.thaw()
        answers = [future.result(60) for future in running]
        refused = [future.result(60) for future in waiting]
        first = streamed.recv(12)
    assert server.process.wait(60) == 0
    statuses = [answer.status_code for answer in answers + refused] + [int(first.split()[1])]
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(200) == in_slots, "exactly the requests with a slot are answered"
    for prompt, answer in zip(bystanders.expected, answers, strict=False):
        if answer.status_code == 200:
            assert answer.json()["results"][0]["text"] == bystanders.expected[prompt]
    assert "Traceback" not in server.log.read_text()


def test_stalled_engine_fails_livez(start, hold):
    server = start("--stall-timeout-s", "1")
    time.sleep(1.5)
    assert httpx.get(f"{server.url}/livez").status_code == 200, "an idle engine is not stalled"
    hold.freeze("loop")
    connection = connect(server, BODY)
    server.until(lambda: httpx.get(f"{server.url}/livez").status_code == 503)
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    hold.thaw()
    server.until(lambda: httpx.get(f"{server.url}/livez").status_code == 200)
    connection.close()


def test_dead_engine_ends_process(start, hold):
    server = start()
    (hold.folder / "die").touch()
    answer = httpx.post(f"{server.url}/generate", json=BODY, timeout=60)
    assert answer.status_code == 503
    assert server.process.wait(60) == 1, "so that a supervisor restarts it"
    assert "slr-serve: error: the engine has failed" in server.log.read_text()


def test_kill_and_restart(start, made):
    server = start()
    connection = connect(server, {**BODY, "n": 8, "stream": True})
    connection.recv(1)
    server.process.kill()
    server.process.wait(60)
    again = start()
    bystanders = Bystanders(made, again)
    bystanders.check(bystanders.ask())
    again.idle()
    assert again.stop() == 0
