"""The workspace ``token`` over HTTP: iterations of every token, in answers, streams and metrics."""

from fastapi.testclient import TestClient

from slr_core.engine import Engine
from slr_core.generation.reference import generate
from slr_server.app import create_app
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server import events
from tests.server.conftest import sample

BODY = {"prompt": tiny.PROMPTS[2], "max_iterations": 4, "convergence": {"threshold": 0.9}, "max_new_tokens": 5}


def test_iterations_per_token():
    made = tiny.reasoner("gpt2", {"workspace": "token", "deeper_cache": "shared"})
    loop = {"max_iterations": 4, "threshold": 0.9}
    expected = generate(made, [tiny.request(made, tiny.PROMPTS[2], loop, max_new_tokens=5)])[0]
    iterations = list(expected.iterations_per_token)
    assert len(set(iterations)) > 1
    with Engine(made, threads=1, slots=2) as engine, TestClient(create_app(ServerSettings(), engine)) as client:
        for path in ("/generate", "/trace"):
            (result,) = client.post(path, json=BODY).json()["results"]
            assert (result["text"], result["iterations_per_token"]) == (expected.text, iterations)
            assert result["usage"]["forward_passes"] == expected.forward_passes
        assert len(result["trace"]) == iterations[0]
        told = events.of(client.post("/generate", json=BODY | {"stream": True}).text)
        assert [event.data["iterations"] for event in told if event.name == "token"] == iterations
        slr = {"max_iterations": 4, "convergence": {"threshold": 0.9}}
        body = {"model": "prosqa", "prompt": tiny.PROMPTS[2], "max_tokens": 5, "temperature": 0, "slr": slr}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["slr"]["iterations_per_token"] == iterations
        # The loops of all tokens of four answers; the prompt's saves nothing.
        assert sample(client, "slr_loop_iterations_count") == 4 * len(iterations)
        assert sample(client, "slr_loop_iterations_sum") == 4 * sum(iterations)
        assert sample(client, "slr_loop_saved_iterations_total") == 4 * sum(4 - n for n in iterations[1:])
