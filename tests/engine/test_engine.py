"""The engine from outside: answers, capacity, threads, closing."""

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slr_core.engine import Engine, IterationEvent, thread_count
from slr_core.engine.engine import GIB
from slr_core.engine.runner.kv_cache import position_bytes
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.errors import CheckpointError, ConfigError, EngineError, RequestError
from slr_core.generation.reference import generate
from slr_core.params import LoopParams, SamplingParams
from tests import tiny
from tests.engine.harness import TIMEOUT, SteppedCore, facts, gated, is_empty, wait_until

LOOPS = (
    {"max_iterations": 0},
    {"max_iterations": 2, "criterion": "fixed"},
    {"max_iterations": 8, "criterion": "relative_change", "threshold": 0.5},
    {"max_iterations": 6, "criterion": "argmax_stable"},
)
WORKSPACES = tuple(tiny.WORKSPACES)


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


@pytest.fixture(scope="module")
def requests(made):
    return [
        tiny.request(made, prompt, LOOPS[i % len(LOOPS)], sampling=SamplingParams(temperature=i % 2, seed=i))
        for i, prompt in enumerate(tiny.PROMPTS * 2)
    ]


@pytest.fixture(scope="module")
def expected(made, requests):
    return [facts(generate(made, [request])[0]) for request in requests]


def fixed(iterations, tokens=6):
    return {"loop": {"max_iterations": iterations, "criterion": "fixed"}, "max_new_tokens": tokens}


# -- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 32])
def test_requests_from_many_threads(made, requests, expected, slots):
    start = threading.Barrier(4)
    with Engine(made, slots=slots) as serving, ThreadPoolExecutor(4) as pool:

        def client(share):
            start.wait(TIMEOUT)
            return [(i, serving.submit(requests[i])) for i in share]

        shares = [range(k, len(requests), 4) for k in range(4)]
        futures = [pair for share in pool.map(client, shares) for pair in share]
        answers = {i: facts(future.result(TIMEOUT)) for i, future in futures}
    assert [answers[i] for i in range(len(requests))] == expected
    assert is_empty(serving._core)


def test_an_expected_embedding_does_not_read_the_head_again(monkeypatch):
    """Where the exit criterion has read it; before the first iteration nothing has."""
    made = tiny.reasoner(loop={"projection": {"kind": "expected_embedding", "top_tokens": 3}})
    request = tiny.request(made, tiny.PROMPTS[0], {"max_iterations": 4, "min_iterations": 4, "criterion": "kl"})
    expected, read, head = facts(generate(made, [request])[0]), [], made.head
    monkeypatch.setattr(made, "head", lambda states: (read.append(len(states)), head(states))[1])
    with Engine(made, slots=1) as serving:
        assert facts(serving.submit(request).result(TIMEOUT)) == expected
    assert read == [1]


def test_generate_samples_and_stops(made):
    loop, prompt = {"max_iterations": 2, "criterion": "fixed"}, tiny.PROMPTS[2]
    seeded = SamplingParams(temperature=1.5, seed=3)
    with Engine(made, slots=3) as serving:
        greedy, once, again = (
            serving.generate(prompt, sampling, LoopParams(**loop), max_new_tokens=8)[0]
            for sampling in (None, seeded, seeded)
        )
        many = serving.generate([prompt] * 8, SamplingParams(temperature=1.5), LoopParams(**loop), max_new_tokens=8)
        word = greedy.text.split()[1]
        stopped = [
            serving.generate(prompt, None, LoopParams(**loop), max_new_tokens=8, stop=stop)[0]
            for stop in (word, [word])
        ]
    assert (
        facts(once)
        == facts(again)
        == facts(generate(made, [tiny.request(made, prompt, loop, max_new_tokens=8, sampling=seeded)])[0])
    )
    assert len({result.token_ids for result in (greedy, once, *many)}) > 2
    assert [(result.text, result.finish_reason) for result in stopped] == [(greedy.text.split(word)[0], "stop")] * 2


def test_generate_refuses_before_anything_runs(made):
    with Engine(made, slots=2) as serving:
        for prompts, options in ((["w1", ""], {}), (["w1", "w2"], {"max_new_tokens": 10**6})):
            with pytest.raises(RequestError):
                serving.generate(prompts, **options)
        assert serving.counters.steps == serving.queued == serving.in_flight == 0


def test_reference_runs_between_steps(made, requests, expected):
    stepped = SteppedCore(made, slots=4)
    futures = [stepped.submit(request) for request in requests[:4]]
    for request, alone in zip(requests[:4], expected[:4], strict=True):
        stepped.step()
        assert facts(generate(made, [request])[0]) == alone
    stepped.drain()
    assert [facts(future.result(0)) for future in futures] == expected[:4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, caplog):
    made = tiny.reasoner(plain=tiny.base().to(dtype), decode=True)
    requests = [
        tiny.request(made, prompt, {"max_iterations": i % 4, "criterion": "kl"}, trace=i % 2 == 0, include_states=True)
        for i, prompt in enumerate(tiny.PROMPTS)
    ]
    stepped = SteppedCore(made, slots=4)
    futures = [stepped.submit(request) for request in requests]
    stepped.drain()
    assert is_empty(stepped.core)
    results = [future.result(0) for future in futures]
    assert all(result.states.dtype == torch.float32 for result in results)
    assert not caplog.records
    if dtype == torch.float64:  # in bf16, rounding depends on the batch
        assert [facts(result) for result in results] == [facts(generate(made, [request])[0]) for request in requests]


def test_from_pretrained(made, tmp_path):
    made.save_pretrained(str(tmp_path / "checkpoint"))
    with Engine.from_pretrained(str(tmp_path / "checkpoint"), slots=2) as serving:
        assert serving.slots == 2
        (result,) = serving.generate(tiny.PROMPTS[1], max_new_tokens=4)
    assert facts(result) == facts(generate(made, [tiny.request(made, tiny.PROMPTS[1], max_new_tokens=4)])[0])
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(str(tmp_path / "nowhere"))


# -- slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
        ({"prefix_gib": -0.5}, "prefix_gib must be at least 0, got -0.5"),
        ({"capacity": 1}, "room for 1 positions"),
        ({"cache_gib": 1e-7}, "room for 0 positions"),
        ({"cache_gib": -1.0}, "positions"),
    ],
)
def test_invalid_options(made, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(made, **options)


def test_capacity_is_what_model_and_memory_allow(made):
    position = position_bytes(made.base)
    for gib, capacity in ((4.0, tiny.POSITIONS), (4 * 30 * position / GIB, 30), ((4 * 31 * position - 1) / GIB, 30)):
        with Engine(made, slots=4, cache_gib=gib) as serving:
            assert serving.capacity == capacity


@pytest.mark.parametrize(("workspace", "taken"), [("append", 3), ("block", 3), ("prompt", 0)])
def test_request_may_fill_a_slot(workspace, taken):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace], text={"answer_prefix": "w7 w8"})
    prompt, loop = tiny.words(*range(9)), fixed(3)["loop"]
    with Engine(made, slots=2, capacity=24) as serving:
        params = LoopParams(**loop)
        request = serving.prepare(prompt, loop_params=params)
        assert request.max_new_tokens == 24 - 9 - 2 - taken
        (alone,) = generate(made, [request])
        futures = [serving.submit(request) for _ in range(2)]
        assert [facts(future.result(TIMEOUT)) for future in futures] == [facts(alone)] * 2
        with pytest.raises(RequestError, match=r"max_new_tokens must be at most"):
            serving.prepare(prompt, loop_params=params, max_new_tokens=request.max_new_tokens + 1)
        # Prepared for the whole model, not for a slot.
        large = tiny.request(made, prompt, loop, max_new_tokens=request.max_new_tokens + 1)
        with pytest.raises(RequestError, match=r"may need 25 positions, a slot has 24") as caught:
            serving.submit(large)
        assert caught.value.param == "prompt"
        assert serving.queued == 0
    assert is_empty(serving._core)


# -- batching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_single_request_takes_as_many_steps_as_passes(workspace, iterations):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace], text={"answer_prefix": "w7"})
    stepped = SteppedCore(made, prefix_gib=0)
    calls = []
    stepped.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    future = stepped.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(iterations)))
    stepped.drain()
    assert future.result(0).forward_passes == stepped.counters.steps == len(calls)


@pytest.mark.parametrize("lora", [{"kind": "none"}, {"kind": "shared", "covers": "all"}], ids=["none", "all"])
def test_answer_prefix_joins_the_last_thought(lora):
    """Of known length and with one adapter, a chain and the prefix after it take one pass less, for the same answer."""
    made = tiny.reasoner(loop={"lora": lora}, text={"answer_prefix": "w7 w8"})
    requests = [tiny.request(made, tiny.PROMPTS[i], **fixed(n)) for i, n in enumerate((3, 1, 2, 3, 0))]
    requests.append(tiny.request(made, tiny.PROMPTS[5], {"max_iterations": 3, "criterion": "cosine", "threshold": 0.0}))
    expected = [facts(generate(made, [request])[0]) for request in requests]
    for options in ({}, {"packing": False}, {"static_shapes": True}):
        stepped = SteppedCore(made, prefix_gib=0, static_shapes="static_shapes" in options)
        stepped.core.runner.packing &= "packing" not in options
        alone = stepped.submit(requests[0])
        stepped.drain()
        result = alone.result(0)
        assert result.forward_passes == 1 + 3 + result.completion_tokens - 1
        assert stepped.counters.steps == result.forward_passes + ("static_shapes" in options)
        futures = [stepped.submit(request) for request in requests]
        stepped.drain()
        assert [facts(future.result(0)) for future in futures] == expected


def test_answer_prefix_after_a_broken_last_thought():
    """The last good thought is decoded, and the prefix is run again after it."""
    made = tiny.reasoner(loop={"lora": {"kind": "none"}}, text={"answer_prefix": "w7 w8"})
    (expected,) = generate(made, [tiny.request(made, tiny.PROMPTS[1], **fixed(2))])
    stepped = SteppedCore(made, prefix_gib=0)
    shapes = []

    def break_last(_, args, options):
        shapes.append(tuple(options["inputs_embeds"].shape[:2]))
        if len(shapes) == 4:
            options["inputs_embeds"].fill_(torch.nan)
        return args, options

    stepped.model.base_model.register_forward_pre_hook(break_last, with_kwargs=True)
    future = stepped.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(3)))
    stepped.drain()
    result = future.result(0)
    assert (result.iterations, result.exit_reason, result.token_ids) == (3, "diverged", expected.token_ids)
    # Prompt, two thoughts, the broken one with the prefix, the prefix alone, and the tokens.
    assert [rows * positions for rows, positions in shapes[:5]] == [5, 1, 1, 3, 2]
    assert len(shapes) == result.forward_passes == 1 + 3 + 1 + result.completion_tokens - 1


def test_single_positions_of_all_phases_share_a_pass(made):
    stepped = SteppedCore(made, slots=4, prefix_gib=0)
    stepped.core.runner.packing = False
    seen = []
    stepped.model.base_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(tuple(options["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    futures = [stepped.submit(tiny.request(made, tiny.words(5), **fixed(1)))]
    stepped.step()
    futures.append(stepped.submit(tiny.request(made, tiny.words(6), **fixed(3))))
    stepped.step()
    futures.append(stepped.submit(tiny.request(made, tiny.words(7), **fixed(2))))
    stepped.step()  # a token, an iteration, a prompt of one token
    assert seen == [(1, 1), (2, 1), (3, 1)]
    # A prompt of five runs in a pass of its own.
    futures.append(stepped.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(2))))
    stepped.step()
    assert seen[3:] == [(3, 1), (1, 5)]
    stepped.drain()
    assert all(future.result(0).token_ids for future in futures)


def test_fast_requests_overtake_a_slow_one(made):
    stepped = SteppedCore(made, slots=2, prefix_gib=0)
    slow = stepped.submit(tiny.request(made, tiny.PROMPTS[0], **fixed(30, 1)))
    quick = [stepped.submit(tiny.request(made, tiny.words(i), **fixed(i % 3, 1))) for i in range(1, 7)]
    stepped.until(lambda: all(future.done() for future in quick))
    # One step for each prompt and one for each iteration, one request after another in the second slot.
    assert stepped.counters.steps == sum(1 + i % 3 for i in range(1, 7))
    assert not slow.done()
    stepped.drain()
    assert slow.result(0).iterations == 30


def test_first_token_comes_with_the_last_iteration(made):
    events = []
    stepped = SteppedCore(made)
    stepped.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(2, 3)), on_event=events.append)
    shown = []
    while stepped.queued or stepped.in_flight:
        stepped.step()
        shown.append([type(event).__name__ for event in events])
        events.clear()
    assert shown[1:] == [
        ["IterationEvent"],
        ["IterationEvent", "TokenEvent"],
        ["TokenEvent"],
        ["TokenEvent", "FinishedEvent"],
    ]


def test_requests_are_admitted_in_order(made, requests):
    stepped = SteppedCore(made, slots=2)
    futures = [stepped.submit(request) for request in requests[:5]]
    assert (stepped.queued, stepped.in_flight) == (5, 0)
    stepped.step()
    assert (stepped.queued, stepped.in_flight) == (3, 2)
    admitted = []
    while stepped.queued:
        stepped.step()
        admitted += [i for i, future in enumerate(futures) if stepped.sequence(future) and i not in admitted]
    assert admitted == sorted(admitted)
    stepped.drain()


def test_long_prompt_runs_in_chunks(made):
    long, short = tiny.words(*range(20)), tiny.words(3)
    requests = [tiny.request(made, prompt, **fixed(2)) for prompt in (short, long)]
    stepped = SteppedCore(made, slots=2, prefill_chunk=4, prefix_gib=0)
    futures = [stepped.submit(request) for request in requests]
    seen = []
    stepped.model.base_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(tuple(options["position_ids"].shape)), with_kwargs=True
    )
    stepped.drain()
    assert seen[:2] == [(1 + 3, 1), (1 + 4, 1)]
    assert stepped.counters.prefill_tokens == 21
    for future, request in zip(futures, requests, strict=True):
        assert facts(future.result(0)) == facts(generate(made, [request])[0])


# -- statistics ----------------------------------------------------------------------------------------


def test_timings_add_up(made, requests):
    stepped = SteppedCore(made, slots=1)
    futures = [stepped.submit(request) for request in requests[:4]]
    stepped.drain()
    for i, future in enumerate(futures):
        result = future.result(0)
        timings = result.timings
        parts = (timings.queue_s, timings.prefill_s, timings.loop_s, timings.decode_s)
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(timings.total_s, abs=1e-9)
        assert timings.queue_s + timings.prefill_s + timings.loop_s <= result.first_token_s <= timings.total_s
        if i:
            # Each waits for the ones before it.
            assert timings.queue_s >= futures[i - 1].result(0).timings.queue_s


def test_counters_and_step_stats(made, requests):
    steps = []
    stepped = SteppedCore(made, slots=3, prefix_gib=0, on_step=steps.append)
    futures = [stepped.submit(request) for request in requests[:8]]
    stepped.drain()
    counters = stepped.counters
    results = [future.result(0) for future in futures]
    assert counters.tokens == sum(len(result.token_ids) for result in results)
    assert counters.iterations == sum(result.iterations for result in results)
    assert counters.prefill_tokens == sum(result.prompt_tokens for result in results)
    assert (counters.reused_tokens, counters.wasted_iterations) == (0, 0)
    assert counters.steps == len(steps)
    assert counters.row_steps == sum(step.rows for step in steps)
    assert counters.iterations == sum(step.iterations for step in steps)
    assert counters.prefill_tokens == sum(step.prefill_tokens for step in steps)
    assert counters.tokens == sum(step.tokens for step in steps)
    assert all(step.duration_s >= 0 and 1 <= step.rows <= 3 for step in steps)
    assert steps[0].used_positions == sum(result.prompt_tokens for result in results[:3])


def test_wasted_iterations_are_counted(made):
    stepped = SteppedCore(made)
    future = stepped.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(5)))
    stepped.step(4)
    future.cancel()
    stepped.drain()
    assert (stepped.counters.iterations, stepped.counters.wasted_iterations) == (3, 3)


def test_error_of_on_step(made, requests, expected, caplog):
    def broken(step):
        raise RuntimeError("statistics are off")

    stepped = SteppedCore(made, on_step=broken)
    future = stepped.submit(requests[1])
    stepped.drain()
    assert facts(future.result(0)) == expected[1]
    assert "statistics are off" in caplog.text


def test_stalled_s_is_the_time_without_a_step(made, requests):
    with gated(made) as (serving, gate):
        assert serving.stalled_s() == 0.0
        future = serving.submit(requests[0])
        wait_until(lambda: serving.stalled_s() > 0.05)  # in its first step
        gate.release()
        wait_until(lambda: serving.stalled_s() < 0.05)
        gate.release(500)
        future.result(TIMEOUT)
        wait_until(lambda: serving.in_flight == 0)
        assert (serving.queued, serving.stalled_s()) == (0, 0.0)


def test_events_come_while_a_request_runs(made):
    events = []
    request = tiny.request(made, tiny.PROMPTS[1], **fixed(3), trace=True, top_tokens=2)
    stepped = SteppedCore(made)
    future = stepped.submit(request, on_event=events.append)
    stepped.step(3)
    assert [event.record.t for event in events if isinstance(event, IterationEvent)] == [1, 2]
    stepped.drain()
    records = [event.record for event in events if isinstance(event, IterationEvent)]
    assert tuple(records) == future.result(0).records


# -- closing ---------------------------------------------------------------------------------------------


def test_close_finishes_running_and_fails_waiting(made, requests, expected):
    with gated(made, slots=2) as (serving, gate):
        futures = [serving.submit(request) for request in requests[:6]]
        gate.release()
        wait_until(lambda: serving.in_flight == 2)
        assert futures[4].cancel()
        assert serving.queued == 3
        serving.close(timeout=0)
    assert not serving.alive
    assert [facts(future.result(0)) for future in futures[:2]] == expected[:2]
    for i in (2, 3, 5):
        with pytest.raises(EngineError, match="shut down"):
            futures[i].result(0)
    with pytest.raises(EngineError, match="shut down"):
        serving.submit(requests[7])
    with pytest.raises(EngineError, match="shut down"):
        serving._thread.call(lambda: None)
    assert is_empty(serving._core)
    assert serving.queued == 0


def own_threads():
    return {thread for thread in threading.enumerate() if thread.name == "slr-engine"}


def test_close_twice(made):
    before = own_threads()
    with Engine(made) as serving:
        assert serving.alive
        assert len(own_threads() - before) == 1
        serving.close()
        serving.close()
    assert not serving.alive
    assert own_threads() == before
    with pytest.raises(EngineError):
        serving.submit(tiny.request(made, "w1"))


@pytest.fixture
def limits(monkeypatch):
    """The limit of each measurement of the thread count, which chooses 1."""
    limits = []

    def choose(run, most):
        run()
        limits.append(most)
        return 1

    monkeypatch.setattr(thread_count, "fastest_threads", choose)
    return limits


def test_thread_count_is_at_most_the_callers(made, limits):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with Engine(made) as first, Engine(made) as second:  # the first one's choice does not limit the second
            assert (first.threads, second.threads, limits) == (1, 1, [3, 3])
        with Engine(made, threads=2) as third:
            assert third.threads == 2
        assert limits == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_timed_step_uses_different_adapters(made, monkeypatch):
    seen, ran = [], []
    used, tuned = LoraBatch.use, LoraBatch.tune
    monkeypatch.setattr(LoraBatch, "use", lambda batch, ids: (ran.append(list(ids)), used(batch, ids))[1])
    monkeypatch.setattr(LoraBatch, "tune", lambda *args: (seen.append("tuned"), tuned(*args))[1])

    def choose(run, most):
        ran.clear()
        run()
        seen.append("chosen")
        return 1

    monkeypatch.setattr(thread_count, "fastest_threads", choose)
    with Engine(made, slots=6) as engine:
        assert seen[-2:] == ["chosen", "tuned"]
        count = engine._lora_batch.count
        assert count > 1
        assert ran == [[row % count for row in range(6)]]


def test_thread_count_is_measured_again(made, limits):
    """After a step whose time has changed, as soon as there is room for the timed step; not if it was given."""
    for threads, expected in ((None, 2), (1, 0)):
        limits.clear()
        with Engine(made, slots=2, threads=threads) as engine:
            answer = engine.generate(tiny.PROMPTS[0])[0].token_ids
            assert len(limits) == expected // 2
            engine._core.step_times.changed = True
            assert engine.generate(tiny.PROMPTS[0])[0].token_ids == answer
        # After closing, so that the engine's thread has finished its last step.
        assert (len(limits), engine._core.step_times.changed) == (expected, threads == 1)


def test_cache_memory_is_used_as_it_is_needed(made):
    """At the start, and after answers, a large cache takes memory for the positions that were written."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("no /proc")

    def mebibytes():
        return int(resident.read_text().split()[1]) * resource.getpagesize() / 2**20

    before = mebibytes()
    with Engine(made, slots=32, capacity=30_000, threads=1) as engine:
        assert engine._core.cache.store.nbytes > 200 * 2**20
        assert len(engine.generate(list(tiny.PROMPTS))) == len(tiny.PROMPTS)
        assert mebibytes() - before < 30


def test_failed_startup_leaves_no_thread(made, monkeypatch):
    def fail(self, *_):
        raise MemoryError("no room for adapters")

    monkeypatch.setattr(LoraBatch, "set_adapters", fail)
    before = own_threads()
    with pytest.raises(MemoryError, match="no room"):
        Engine(made)
    assert own_threads() == before


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_run_idle_changes_nothing(kind, static):
    stepped = SteppedCore(tiny.reasoner(kind), slots=3, static_shapes=static)
    for rows, width in ((1, 1), (3, 9), (99, 9999)):
        stepped.core.run_idle(rows, width)
    assert is_empty(stepped.core)
    assert stepped.counters.steps == 0
