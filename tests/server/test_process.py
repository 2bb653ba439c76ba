"""A server in its own process, with a checkpoint from a folder, over sockets."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from slr_core.generation.reference import generate
from tests import tiny
from tests.server.bad_input import CASES
from tests.server.process import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory, reasoner):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    reasoner.save_pretrained(str(folder))
    started = Server(folder, folder.parent / "log", SLR_MAX_NEW_TOKENS="40")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def test_start(server, http):
    assert server.line.startswith("slr-serve: tiny ready at http://127.0.0.1:")
    for probe in ("/livez", "/readyz", "/startupz"):
        assert http.get(probe).status_code == 200
    # A setting from the environment.
    error = http.post("/generate", json={"prompt": "w1", "max_new_tokens": 41}).json()["error"]
    assert error["param"] == "max_new_tokens"


def test_generate_and_trace(http, reference):
    body = {"prompt": tiny.PROMPTS[1], "max_new_tokens": 6}
    expected = generate(reference, [tiny.request(reference, tiny.PROMPTS[1])])[0]
    for path in ("/generate", "/trace"):
        answer = http.post(path, json=body).json()
        assert answer["model"] == "tiny"
        (result,) = answer["results"]
        assert (result["text"], result["iterations"]) == (expected.text, expected.iterations)
    assert len(result["trace"]) == expected.iterations


def test_no_nagle_delay(http):
    http.get("/livez")
    durations = sorted(http.get("/livez").elapsed.total_seconds() for _ in range(9))
    assert durations[4] < 0.03


def test_bad_input(http):
    for given in CASES:
        content, headers, status, param, code = given.values
        response = http.post("/generate", content=content, headers=headers)
        assert response.status_code == status, given.id
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code), given.id
    assert http.post("/generate", json={"prompt": "w1"}).status_code == 200


def test_endless_body(http):
    def chunks():
        for _ in range(64):
            yield b" " * (1 << 16)

    response = http.post("/generate", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize("size", [40_000, 200_000])
def test_too_large_headers(http, size):
    response = http.get("/livez", headers={"x-flood": "x" * size})
    assert response.status_code in (431, 400), "refused by the application, or by the HTTP parser"
    assert http.get("/livez").status_code == 200


def test_concurrent_requests(http, reference):
    def ask(prompt):
        return http.post("/generate", json={"prompt": prompt, "max_new_tokens": 6}).json()["results"][0]["text"]

    prompts = tiny.PROMPTS * 4
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, prompts))
    expected = {p: generate(reference, [tiny.request(reference, p)])[0].text for p in tiny.PROMPTS}
    assert texts == [expected[prompt] for prompt in prompts]


def test_client_timeouts(http):
    for _ in range(5):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/generate", json={"prompt": list(tiny.PROMPTS) * 2}, timeout=0.01)
    assert http.post("/generate", json={"prompt": "w1"}).status_code == 200
    deadline = time.monotonic() + 20
    while "slr_requests_queued 0.0" not in http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    metrics = http.get("/metrics").text
    assert 'slr_requests_total{endpoint="/generate",status="cancelled"} 5.0' in metrics
    assert 'slr_requests_total{endpoint="/generate",status="error"} 0.0' in metrics


def test_sigterm_drains(server, http):
    prompts = list(tiny.PROMPTS) * 8

    with ThreadPoolExecutor() as pool:
        running = pool.submit(http.post, "/generate", json={"prompt": prompts, "max_new_tokens": 40})
        while "slr_slots_in_use 0.0" in httpx.get(f"{server.url}/metrics").text:
            assert not running.done()
        assert server.stop() == 0
        assert len(running.result(20).json()["results"]) == len(prompts)
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "method=POST path=/generate status=200" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/livez")
