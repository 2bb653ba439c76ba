import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import pytest

from slr_core.engine import Engine, engine
from slr_core.errors import CheckpointError, EngineError, RequestError
from slr_core.generation import generate
from slr_core.sampling import SamplingSettings
from tests import tiny

TIMEOUT = 60
LOOPS = (
    {"max_iterations": 0},
    {"max_iterations": 2, "criterion": "fixed"},
    {"max_iterations": 8, "criterion": "relative_change", "threshold": 0.5},
    {"max_iterations": 6, "criterion": "argmax_stable"},
)


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


@pytest.fixture
def requests(made):
    return [
        tiny.request(made, prompt, LOOPS[i % len(LOOPS)], sampling=SamplingSettings(temperature=i % 2, seed=i))
        for i, prompt in enumerate(tiny.PROMPTS * 3)
    ]


class Gate:
    """Stands in for ``generate``: shows each batch, and lets it run only when told."""

    def __init__(self, monkeypatch):
        self.batches = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self.fail = {}
        monkeypatch.setattr(engine, "generate", self)

    def __call__(self, reasoner, batch, *, queued_s):
        self.batches.append(list(batch))
        self.entered.set()
        assert self.open.wait(TIMEOUT)
        for request in batch:
            if request.prompt_ids in self.fail:
                raise self.fail[request.prompt_ids]
        return generate(reasoner, batch, queued_s=queued_s)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.open.set()


@pytest.fixture
def running(made, gate):
    """An engine that is held inside its first batch, of one request."""
    with Engine(made, max_batch=4) as started:
        first = started.submit(tiny.request(made, tiny.words(1, 1)))
        assert gate.entered.wait(TIMEOUT)
        started.first = first
        yield started
        gate.open.set()


def facts(result):
    return result.token_ids, result.text, result.iterations, result.exit_reason, result.finish_reason


# -- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 3, 32])
def test_requests_from_many_threads_get_what_they_get_alone(made, requests, max_batch):
    expected = [facts(generate(made, [request])[0]) for request in requests]
    start = threading.Barrier(6)
    with Engine(made, max_batch=max_batch) as serving, ThreadPoolExecutor(6) as pool:

        def client(share):
            start.wait(TIMEOUT)
            return [(i, serving.submit(requests[i])) for i in share]

        shares = [range(k, len(requests), 6) for k in range(6)]
        futures = [pair for share in pool.map(client, shares) for pair in share]
        answers = {i: facts(future.result(TIMEOUT)) for i, future in futures}
    assert [answers[i] for i in range(len(requests))] == expected


def test_generate_answers_in_the_order_of_its_prompts(made):
    with Engine(made, max_batch=3) as serving:
        results = serving.generate(list(tiny.PROMPTS), max_new_tokens=4, max_iterations=2, criterion="fixed")
        (single,) = serving.generate(tiny.PROMPTS[2], max_new_tokens=4, max_iterations=2, criterion="fixed")
        assert serving.generate([]) == []
    loop = {"max_iterations": 2, "criterion": "fixed"}
    expected = [generate(made, [tiny.request(made, p, loop, max_new_tokens=4)])[0] for p in tiny.PROMPTS]
    assert [facts(result) for result in results] == [facts(result) for result in expected]
    assert facts(single) == facts(expected[2])


@pytest.mark.parametrize("workspace", ["append", "block", "prompt"])
@pytest.mark.parametrize("answers", ["lm_head", "latent_decoder"])
def test_every_workspace_and_writer_is_served_as_alone(workspace, answers):
    decoder = {"answers": answers, "latent_decoder": {"hidden_size": 16, "layers": 1, "heads": 2}}
    loop = {"workspace": workspace, "block_size": 3, "decoder": decoder, "timestep": {"noise_level": True}}
    made = tiny.reasoner(loop=loop, decode=True, text={"answer_prefix": "w7"})
    requests = [
        tiny.request(made, prompt, LOOPS[i % len(LOOPS)], trace=i % 2 == 0, include_states=i % 3 == 0)
        for i, prompt in enumerate(tiny.PROMPTS)
    ]
    expected = [generate(made, [request])[0] for request in requests]
    with Engine(made, max_batch=5) as serving:
        results = [future.result(TIMEOUT) for future in [serving.submit(request) for request in requests]]
    for i, (result, alone) in enumerate(zip(results, expected, strict=True)):
        assert facts(result) == facts(alone)
        assert result.forward_passes == alone.forward_passes
        assert [record.thought for record in result.records] == [record.thought for record in alone.records]
        assert (result.states is not None) == (i % 3 == 0)


def test_generate_refuses_before_anything_runs(made, gate):
    with Engine(made) as serving:
        for prompts, loop in ((["w1", ""], {}), ("w1", {"max_iterations": 2, "min_iterations": 3})):
            with pytest.raises(RequestError):
                serving.generate(prompts, **loop)
        assert gate.batches == []


def test_it_loads_a_checkpoint(made, tmp_path):
    made.save_pretrained(str(tmp_path / "checkpoint"))
    with Engine.from_pretrained(str(tmp_path / "checkpoint"), max_batch=2) as serving:
        assert serving.max_batch == 2
        (result,) = serving.generate(tiny.PROMPTS[1], max_new_tokens=4)
    assert facts(result) == facts(generate(made, [tiny.request(made, tiny.PROMPTS[1], max_new_tokens=4)])[0])
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(str(tmp_path / "nowhere"))


# -- batching --------------------------------------------------------------------------------------------


def test_what_waits_is_batched_first_come_first_served(running, gate, requests):
    futures = [running.submit(request) for request in requests[:10]]
    assert (running.queued, running.in_flight) == (10, 1)
    gate.open.set()
    results = [future.result(TIMEOUT) for future in futures]
    assert gate.batches[1:] == [requests[0:4], requests[4:8], requests[8:10]]
    assert [len(r.token_ids) > 0 for r in results] == [True] * 10


def test_waiting_counts_in_the_timings(running, gate, requests):
    future = running.submit(requests[0])
    gate.open.set()
    timings = future.result(TIMEOUT).timings
    assert timings.queue_s > 0
    assert timings.total_s >= timings.queue_s


def test_progress_is_told(running, gate, requests):
    future = running.submit(requests[0])
    assert running.stalled_s() >= 0
    before = running.last_progress
    gate.open.set()
    wait([future, running.first], TIMEOUT)
    running.close(TIMEOUT)
    assert running.last_progress > before
    assert (running.queued, running.in_flight, running.stalled_s()) == (0, 0, 0.0)


# -- cancelling ------------------------------------------------------------------------------------------


def test_a_request_cancelled_while_it_waits_never_runs(running, gate, requests):
    futures = [running.submit(request) for request in requests[:5]]
    assert futures[1].cancel()
    assert futures[3].cancel()
    gate.open.set()
    for i in (0, 2, 4):
        assert futures[i].result(TIMEOUT)
    assert gate.batches[1:] == [[requests[0], requests[2], requests[4]]]
    with pytest.raises(CancelledError):
        futures[1].result(TIMEOUT)


def test_a_queue_of_cancelled_requests_is_skipped(running, gate, requests):
    assert all(running.submit(request).cancel() for request in requests[:6])
    assert running.queued == 0
    last = running.submit(requests[7])
    assert running.queued == 1
    gate.open.set()
    assert last.result(TIMEOUT)
    assert gate.batches[1:] == [[requests[7]]]


def test_a_running_request_cannot_be_cancelled(running, gate):
    assert not running.first.cancel()
    gate.open.set()
    assert running.first.result(TIMEOUT)


# -- failing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("out of memory"), EngineError, "out of memory"),
        (KeyError("layer"), EngineError, "layer"),
        (RequestError("cannot", param="prompt"), RequestError, "cannot"),
    ],
    ids=["runtime", "key", "request"],
)
def test_a_request_that_fails_fails_alone_and_the_engine_goes_on(
    running, gate, requests, error, expected, message, caplog
):
    gate.fail[requests[1].prompt_ids] = error
    futures = [running.submit(request) for request in requests[:8]]
    gate.open.set()
    with pytest.raises(expected, match=message):
        futures.pop(1).result(TIMEOUT)
    for future in [running.first, *futures, running.submit(requests[0])]:
        assert future.result(TIMEOUT).token_ids
    assert running.alive
    assert "a batch of 4 requests failed" in caplog.text


def test_rows_that_fail_only_together_are_answered_alone(running, gate, requests, monkeypatch, caplog):
    # Computed while the engine is held: nothing else may run the model beside it.
    expected = [facts(generate(running.reasoner, [request])[0]) for request in requests[:4]]

    def too_many(reasoner, batch, *, queued_s):
        if len(batch) > 1:
            raise RuntimeError("out of memory")
        return gate(reasoner, batch, queued_s=queued_s)

    monkeypatch.setattr(engine, "generate", too_many)
    futures = [running.submit(request) for request in requests[:4]]
    gate.open.set()
    assert [facts(future.result(TIMEOUT)) for future in futures] == expected
    assert "a batch of 4 requests failed" in caplog.text


# -- closing ---------------------------------------------------------------------------------------------


def test_closing_finishes_what_runs_and_refuses_what_waits(running, gate, requests):
    waiting = [running.submit(request) for request in requests[:6]]
    assert waiting[2].cancel()
    running.close(timeout=0)
    assert not running.alive
    with pytest.raises(EngineError, match="shut down"):
        running.submit(requests[7])
    gate.open.set()
    assert running.first.result(TIMEOUT).token_ids
    for i in (0, 1, 3, 4, 5):
        with pytest.raises(EngineError, match="shut down"):
            waiting[i].result(TIMEOUT)
    running.close(TIMEOUT)
    assert len(gate.batches) == 1
    assert running.queued == 0


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name == "slr-engine"]


def test_an_engine_can_be_closed_twice_and_leaves_no_thread(made):
    with Engine(made) as serving:
        assert serving.alive
        assert len(own_threads()) == 1
        serving.close()
        serving.close()
    assert not serving.alive
    assert own_threads() == []
    with pytest.raises(EngineError):
        serving.submit(tiny.request(made, "w1"))


def test_leaving_the_block_by_an_error_closes_it_too(made):
    def fail():
        with Engine(made) as serving:
            engines.append(serving)
            raise KeyError("inside")

    engines = []
    with pytest.raises(KeyError):
        fail()
    assert not engines[0].alive
