"""The model in this process and the one behind a server answer alike."""

import time
from dataclasses import replace
from itertools import chain, islice

import httpx
import pytest

from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.errors import ConfigError, EngineError, RequestError
from slr_core.evaluation.backends import GenerationOptions, Local, Remote
from slr_core.evaluation.methods import METHODS, MethodSettings
from slr_core.evaluation.run import run_method
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate_prosqa
from tests import tiny
from tests.server.test_process import Server

SEEDS = [1000 * i for i in range(len(tiny.PROMPTS))]
ASKS = {
    "default": GenerationOptions(),
    "no loop": GenerationOptions({"max_iterations": 0}),
    "loop": GenerationOptions(
        {"max_iterations": 4, "min_iterations": 2, "criterion": "kl", "threshold": 0.3, "patience": 2}
    ),
    "sampled": GenerationOptions({}, max_new_tokens=5, temperature=1.5, samples=3),
}


@pytest.fixture(scope="module")
def local():
    return Local(tiny.reasoner(text={"max_new_tokens": 8}))


@pytest.fixture(scope="module")
def remote(local, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    local.reasoner.save_pretrained(str(folder))
    yield from _served(folder)


def _served(folder, log=None):
    server = Server(folder, log or folder.parent / "log", "--max-new-tokens", "40")
    try:
        yield Remote(server.url + "/")
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()


def what_a_server_tells(answers):
    unknown = {"flops": None, "added_parameters": None, "relative_change": (), "contraction_rate": None}
    return [[replace(answer, **unknown) for answer in own] for own in answers]


def texts(answers):
    return [[answer.text for answer in own] for own in answers]


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_a_server_answers_as_the_model_in_this_process(local, remote, ask):
    here, there = (backend.answer(tiny.PROMPTS, ask, SEEDS) for backend in (local, remote))
    assert what_a_server_tells(there) == what_a_server_tells(here)
    assert [len(own) for own in there] == [ask.samples] * len(tiny.PROMPTS)
    for mine, its in zip(chain(*here), chain(*there), strict=True):
        assert its.relative_change == pytest.approx(mine.relative_change, rel=1e-3)
        assert (its.contraction_rate or 0.0) == pytest.approx(mine.contraction_rate or 0.0, rel=1e-3)
        assert mine.flops > 0
        assert its.flops is its.added_parameters is None


def test_the_model_answers_as_its_requests_say(local):
    made = local.reasoner
    loop = {"max_iterations": 4, "criterion": "fixed"}
    answers = local.answer(tiny.PROMPTS, GenerationOptions(loop, max_new_tokens=3), SEEDS)
    results = [generate(made, [tiny.request(made, p, loop, max_new_tokens=3)])[0] for p in tiny.PROMPTS]
    assert [(own.text, own.iterations, own.tokens) for (own,) in answers] == [
        (result.text, 4, result.completion_tokens) for result in results
    ]


def test_a_draw_depends_on_its_seed_alone(local):
    ask = ASKS["sampled"]
    together = local.answer(tiny.PROMPTS, ask, SEEDS)
    assert texts(local.answer(tiny.PROMPTS[3:5], ask, SEEDS[3:5])) == texts(together)[3:5]
    assert len(set(chain(*texts(together)))) > len(tiny.PROMPTS)
    # Sample 1 from a seed is sample 0 from the next.
    (shifted,) = texts(local.answer(tiny.PROMPTS[:1], ask, [SEEDS[0] + 1]))
    assert shifted[:2] == texts(together)[0][1:]


# -- errors ----------------------------------------------------------------------------------------------


def answering(handler):
    return Remote("http://server.test/", transport=httpx.MockTransport(handler))


def test_what_the_server_refuses_is_a_request_error_that_names_it(remote):
    with pytest.raises(RequestError, match=rf"{remote.url}: 400, .*max_new_tokens must be at most 40"):
        remote.answer(tiny.PROMPTS, GenerationOptions(max_new_tokens=41), SEEDS)
    with pytest.raises(RequestError, match=remote.url):
        remote.answer(["", "w1"], GenerationOptions(), [0, 1])


def test_unreachable_server(no_pauses):
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9: the server cannot be reached: .*refused"):
        Remote("http://127.0.0.1:9").answer(["w1"], GenerationOptions(), [0])


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (503, '{"error": {"message": "shutting down"}}', EngineError),
        (500, "<html>", EngineError),
        (502, '{"error": "bad gateway"}', EngineError),
        (404, '{"detail": "Not Found"}', RequestError),
        (429, '{"error": {"message": "queue is full"}}', EngineError),
        (302, "", EngineError),
        (200, "<html>", EngineError),
        (200, "[]", EngineError),
        (200, '{"results": [{"text": "w1"}]}', EngineError),
        (200, '{"results": [{"budget_reduced": true}]}', EngineError),
    ],
)
def test_every_failing_answer_is_an_error_that_names_the_server(no_pauses, status, body, kind):
    with pytest.raises(kind, match=r"http://server\.test:") as caught:
        answering(lambda _: httpx.Response(status, text=body)).answer(["w1"], GenerationOptions(), [0])
    for said in ("shutting down", "queue is full"):
        assert (said in body) == (said in str(caught.value))
    if status != 200:
        assert str(status) in str(caught.value)


def test_api_key_is_sent():
    keys = []

    def handler(request):
        keys.append(request.headers.get("authorization"))
        return httpx.Response(401, json={"error": {"message": "no key", "param": None}})

    for key in ("sesame", None):
        remote = Remote("http://server.test", api_key=key, transport=httpx.MockTransport(handler))
        with pytest.raises(RequestError, match=r"http://server\.test: 401, no key"):
            remote.answer(["w1"], GenerationOptions(), [0])
    assert keys == ["Bearer sesame", None]


def test_the_model_behind_a_url_is_known_by_its_hash():
    """Stored answers of one model are not taken for those of another that is served at the same URL."""
    served = {"sha256": "a" * 64, "dtype": "float32", "quantization": "none"}
    remote = answering(lambda request: httpx.Response(200, json=served))
    assert remote.identify() == {"name": "http://server.test", **served}
    before = remote.identify()
    for field in ("sha256", "dtype", "quantization"):
        served = {**served, field: "another"}
        assert remote.identify() != before
        before = remote.identify()
    served = {**served, "sha256": None}
    assert "sha256" not in remote.identify()


def test_a_server_that_does_not_tell_its_model_is_an_error_that_names_it(no_pauses):
    for answer, kind in ((httpx.Response(404), RequestError), (httpx.Response(200, json={}), EngineError)):
        with pytest.raises(kind, match=r"http://server\.test: "):
            answering(lambda request, answer=answer: answer).identify()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_what_is_no_url_is_refused():
    with pytest.raises(ConfigError, match="not a URL"):
        Remote("http://[::1:8000")
    with pytest.raises(EngineError, match=r"server\.test"):
        Remote("server.test").answer(["w1"], GenerationOptions(), [0])


# -- at size ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_300_questions_in_process_and_by_server(tmp_path):
    questions = list(islice(generate_prosqa(GraphSpec(10, 2, 4, balanced=True), 31), 300))
    here = run_method(METHODS["slr"], Local(LatentReasoner.from_pretrained()), ProsQA(), questions, MethodSettings({}))
    for remote in _served(DEFAULT_CHECKPOINT, tmp_path / "log"):
        there = run_method(METHODS["slr"], remote, ProsQA(), questions, MethodSettings({}), batch_size=50)
    alike = [
        (mine.key, mine.text, mine.iterations, mine.exit_reason) == (its.key, its.text, its.iterations, its.exit_reason)
        for mine, its in zip(here, there, strict=True)
    ]
    assert len(alike) == 300
    assert all(alike)
    assert len({mine.iterations for mine in here}) > 2
