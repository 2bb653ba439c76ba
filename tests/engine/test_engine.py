"""The engine from outside: answers, order, what it tells of itself, closing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slr_core.engine import Engine, IterationEvent
from slr_core.engine import engine as engine_module
from slr_core.engine.engine import GIB
from slr_core.engine.runner.kv_cache import position_bytes
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.errors import CheckpointError, ConfigError, EngineError, RequestError
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams
from tests import tiny
from tests.engine.stepped import TIMEOUT, Stepped, empty, facts

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
def test_requests_from_many_threads_get_what_they_get_alone(made, requests, expected, slots):
    start = threading.Barrier(4)
    with Engine(made, slots=slots) as serving, ThreadPoolExecutor(4) as pool:

        def client(share):
            start.wait(TIMEOUT)
            return [(i, serving.submit(requests[i])) for i in share]

        shares = [range(k, len(requests), 4) for k in range(4)]
        futures = [pair for share in pool.map(client, shares) for pair in share]
        answers = {i: facts(future.result(TIMEOUT)) for i, future in futures}
    assert [answers[i] for i in range(len(requests))] == expected
    assert empty(serving)


def test_generate_answers_in_the_order_of_its_prompts(made):
    loop = {"max_iterations": 2, "criterion": "fixed"}
    with Engine(made, slots=3) as serving:
        results = serving.generate(list(tiny.PROMPTS), max_new_tokens=4, **loop)
        (single,) = serving.generate(tiny.PROMPTS[2], max_new_tokens=4, **loop)
        assert serving.generate([]) == []
    alone = [generate(made, [tiny.request(made, p, loop, max_new_tokens=4)])[0] for p in tiny.PROMPTS]
    assert [facts(result) for result in results] == [facts(result) for result in alone]
    assert facts(single) == facts(alone[2])


def test_generate_samples_and_stops_as_asked(made):
    loop, prompt = {"max_iterations": 2, "criterion": "fixed"}, tiny.PROMPTS[2]
    seeded = SamplingParams(temperature=1.5, seed=3)
    with Engine(made, slots=3) as serving:
        greedy, once, again = (
            serving.generate(prompt, max_new_tokens=8, sampling=sampling, **loop)[0]
            for sampling in (None, seeded, seeded)
        )
        many = serving.generate([prompt] * 8, max_new_tokens=8, sampling=SamplingParams(temperature=1.5), **loop)
        word = greedy.text.split()[1]
        stopped = [serving.generate(prompt, max_new_tokens=8, stop=stop, **loop)[0] for stop in (word, [word])]
    assert (
        facts(once)
        == facts(again)
        == facts(generate(made, [tiny.request(made, prompt, loop, max_new_tokens=8, sampling=seeded)])[0])
    )
    assert len({result.token_ids for result in (greedy, once, *many)}) > 2
    assert [(result.text, result.finish_reason) for result in stopped] == [(greedy.text.split(word)[0], "stop")] * 2


def test_generate_refuses_before_anything_runs(made):
    with Stepped(made) as serving:
        for prompts, loop in ((["w1", ""], {}), ("w1", {"max_iterations": 2, "min_iterations": 3})):
            with pytest.raises(RequestError):
                serving.generate(prompts, **loop)
        assert serving.queued == serving.in_flight == 0


def test_the_reference_may_run_beside_its_engine(made, requests, expected):
    with Stepped(made, slots=4) as serving:
        futures = [serving.submit(request) for request in requests[:4]]
        for request, alone in zip(requests[:4], expected[:4], strict=True):
            serving.step()
            assert facts(generate(made, [request])[0]) == alone
        serving.drain()
    assert [facts(future.result(0)) for future in futures] == expected[:4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_numbers_are_served(dtype, caplog):
    made = tiny.reasoner(plain=tiny.base().to(dtype), decode=True)
    asked = [
        tiny.request(made, prompt, {"max_iterations": i % 4, "criterion": "kl"}, trace=i % 2 == 0, include_states=True)
        for i, prompt in enumerate(tiny.PROMPTS)
    ]
    with Stepped(made, slots=4) as serving:
        futures = [serving.submit(request) for request in asked]
        serving.drain()
        assert empty(serving)
    results = [future.result(0) for future in futures]
    assert all(result.states.dtype == torch.float32 for result in results)
    assert not caplog.records
    if dtype == torch.float64:  # bf16 rounds a batch otherwise than its rows
        assert [facts(result) for result in results] == [facts(generate(made, [request])[0]) for request in asked]


def test_it_loads_a_checkpoint(made, tmp_path):
    made.save_pretrained(str(tmp_path / "checkpoint"))
    with Engine.from_pretrained(str(tmp_path / "checkpoint"), slots=2) as serving:
        assert serving.slots == 2
        (result,) = serving.generate(tiny.PROMPTS[1], max_new_tokens=4)
    assert facts(result) == facts(generate(made, [tiny.request(made, tiny.PROMPTS[1], max_new_tokens=4)])[0])
    with pytest.raises(CheckpointError):
        Engine.from_pretrained(str(tmp_path / "nowhere"))


# -- what fits -------------------------------------------------------------------------------------------


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
def test_an_engine_that_could_serve_nobody_is_refused(made, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(made, **options)


def test_a_slot_is_as_long_as_the_model_or_as_memory_allows(made):
    column = position_bytes(made.base)
    for gib, capacity in ((4.0, tiny.POSITIONS), (4 * 30 * column / GIB, 30), ((4 * 31 * column - 1) / GIB, 30)):
        with Engine(made, slots=4, cache_gib=gib) as serving:
            assert serving.capacity == capacity


@pytest.mark.parametrize(("workspace", "taken"), [("append", 3), ("block", 3), ("prompt", 0)])
def test_a_slot_can_be_used_to_its_last_column_and_no_further(workspace, taken):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace], text={"answer_prefix": "w7 w8"})
    prompt, asked = tiny.words(*range(9)), fixed(3, None)
    with Stepped(made, slots=2, capacity=24) as serving:
        settings = tiny.request(made, prompt, asked["loop"]).loop
        request = serving.prepare(prompt, settings)
        assert request.max_new_tokens == 24 - 9 - 2 - taken
        (alone,) = generate(made, [request])
        futures = [serving.submit(request) for _ in range(2)]
        serving.drain()
        assert [facts(future.result(0)) for future in futures] == [facts(alone)] * 2
        assert empty(serving)
        with pytest.raises(RequestError, match=r"max_new_tokens must be at most"):
            serving.prepare(prompt, settings, max_new_tokens=request.max_new_tokens + 1)
        # Prepared for the whole model, not for a slot.
        large = tiny.request(made, prompt, asked["loop"], max_new_tokens=request.max_new_tokens + 1)
        with pytest.raises(RequestError, match=r"may need 25 positions, a slot has 24") as caught:
            serving.submit(large)
        assert caught.value.param == "prompt"
        assert serving.queued == 0


# -- batching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_a_lone_request_takes_as_many_steps_as_passes(workspace, iterations):
    made = tiny.reasoner(loop=tiny.WORKSPACES[workspace], text={"answer_prefix": "w7"})
    with Stepped(made, prefix_gib=0) as serving:
        calls = []
        serving.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
        future = serving.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(iterations)))
        serving.drain()
        assert future.result(0).forward_passes == serving.counters.steps == len(calls)


def test_single_positions_share_a_pass_whatever_they_do(made):
    with Stepped(made, slots=4, prefix_gib=0) as serving:
        serving._core.passes.supports_packing = False
        seen = []
        serving.model.base_model.register_forward_pre_hook(
            lambda _, args, options: seen.append(tuple(options["inputs_embeds"].shape[:2])), with_kwargs=True
        )
        futures = [serving.submit(tiny.request(made, tiny.words(5), **fixed(1)))]
        serving.step()
        futures.append(serving.submit(tiny.request(made, tiny.words(6), **fixed(3))))
        serving.step()
        futures.append(serving.submit(tiny.request(made, tiny.words(7), **fixed(2))))
        serving.step()  # a token, an iteration, a prompt of one token
        assert seen == [(1, 1), (2, 1), (3, 1)]
        # A prompt of five runs in a pass of its own.
        futures.append(serving.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(2))))
        serving.step()
        assert seen[3:] == [(3, 1), (1, 5)]
        serving.drain()
        assert all(future.result(0).token_ids for future in futures)


def test_nobody_waits_for_the_slowest(made):
    with Stepped(made, slots=2, prefix_gib=0) as serving:
        slow = serving.submit(tiny.request(made, tiny.PROMPTS[0], **fixed(30, 1)))
        quick = [serving.submit(tiny.request(made, tiny.words(i), **fixed(i % 3, 1))) for i in range(1, 7)]
        serving.until(lambda: all(future.done() for future in quick))
        # One step for the prompt and one an iteration, one after another in the second slot.
        assert serving.counters.steps == sum(1 + i % 3 for i in range(1, 7))
        assert not slow.done()
        serving.drain()
        assert slow.result(0).iterations == 30


def test_a_loop_that_is_over_decodes_in_the_same_step(made):
    events = []
    with Stepped(made) as serving:
        serving.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(2, 3)), on_event=events.append)
        shown = []
        while serving.queued or serving.in_flight:
            serving.step()
            shown.append([type(event).__name__ for event in events])
            events.clear()
    assert shown[1:] == [
        ["IterationEvent"],
        ["IterationEvent", "TokenEvent"],
        ["TokenEvent"],
        ["TokenEvent", "FinishedEvent"],
    ]


def test_first_come_first_served(made, requests):
    with Stepped(made, slots=2) as serving:
        futures = [serving.submit(request) for request in requests[:5]]
        assert (serving.queued, serving.in_flight) == (5, 0)
        serving.step()
        assert (serving.queued, serving.in_flight) == (3, 2)
        admitted = []
        while serving.queued:
            serving.step()
            admitted += [i for i, future in enumerate(futures) if serving.sequence(future) and i not in admitted]
        assert admitted == sorted(admitted)
        serving.drain()


def test_a_long_prompt_is_run_in_pieces_and_holds_nobody_up(made):
    long, short = tiny.words(*range(20)), tiny.words(3)
    requests = [tiny.request(made, prompt, **fixed(2)) for prompt in (short, long)]
    with Stepped(made, slots=2, prefill_chunk=4, prefix_gib=0) as serving:
        futures = [serving.submit(request) for request in requests]
        seen = []
        serving.model.base_model.register_forward_pre_hook(
            lambda _, args, options: seen.append(tuple(options["position_ids"].shape)), with_kwargs=True
        )
        serving.drain()
        assert seen[:2] == [(1 + 3, 1), (1 + 4, 1)]
        assert serving.counters.prefill_tokens == 21
    for future, request in zip(futures, requests, strict=True):
        assert facts(future.result(0)) == facts(generate(made, [request])[0])


# -- what it tells of itself -----------------------------------------------------------------------------


def test_timings_add_up_and_waiting_is_part_of_them(made, requests):
    with Stepped(made, slots=1) as serving:
        futures = [serving.submit(request) for request in requests[:4]]
        serving.drain()
    for i, future in enumerate(futures):
        result = future.result(0)
        timings = result.timings
        parts = (timings.queue_s, timings.prefill_s, timings.loop_s, timings.decode_s)
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(timings.total_s, abs=1e-9)
        assert timings.queue_s + timings.prefill_s + timings.loop_s <= result.first_token_s <= timings.total_s
        if i:
            # Each waited for the ones before it.
            assert timings.queue_s >= futures[i - 1].result(0).timings.queue_s


def test_what_was_done_is_counted_and_told_step_by_step(made, requests):
    steps = []
    with Stepped(made, slots=3, prefix_gib=0, on_step=steps.append) as serving:
        futures = [serving.submit(request) for request in requests[:8]]
        serving.drain()
        counters = serving.counters
    results = [future.result(0) for future in futures]
    assert counters.tokens == sum(len(result.token_ids) for result in results)
    assert counters.iterations == sum(result.iterations for result in results)
    assert counters.prefill_tokens == sum(result.prompt_tokens for result in results)
    assert (counters.reused_tokens, counters.wasted_iterations) == (0, 0)
    assert counters.steps == len(steps)
    assert counters.row_steps == sum(step.rows for step in steps)
    assert counters.iterations == sum(step.looping for step in steps)
    assert counters.prefill_tokens == sum(step.prefill_tokens for step in steps)
    assert counters.tokens == sum(step.written for step in steps)
    assert all(step.duration_s >= 0 and 1 <= step.rows <= 3 for step in steps)
    assert steps[0].columns == sum(result.prompt_tokens for result in results[:3])


def test_iterations_that_no_answer_came_of_are_counted(made):
    with Stepped(made) as serving:
        future = serving.submit(tiny.request(made, tiny.PROMPTS[1], **fixed(5)))
        serving.step(4)
        future.cancel()
        serving.drain()
        assert (serving.counters.iterations, serving.counters.wasted_iterations) == (3, 3)


def test_who_hears_of_steps_and_fails_stops_nothing(made, requests, expected, caplog):
    def broken(step):
        raise RuntimeError("statistics are off")

    with Stepped(made, on_step=broken) as serving:
        future = serving.submit(requests[1])
        serving.drain()
        assert facts(future.result(0)) == expected[1]
        assert serving.alive
    assert "statistics are off" in caplog.text


def test_progress_is_told(made, requests):
    with Stepped(made) as serving:
        before = serving.last_progress
        assert serving.stalled_s() == 0.0
        future = serving.submit(requests[0])
        assert serving.stalled_s() >= 0
        serving.drain()
        assert future.done()
        assert serving.last_progress > before
        assert (serving.queued, serving.in_flight, serving.stalled_s()) == (0, 0, 0.0)


def test_a_request_is_followed_while_it_runs(made):
    events = []
    request = tiny.request(made, tiny.PROMPTS[1], **fixed(3), trace=True, top_tokens=2)
    with Stepped(made) as serving:
        future = serving.submit(request, on_event=events.append)
        serving.step(3)
        assert [event.record.t for event in events if isinstance(event, IterationEvent)] == [1, 2]
        serving.drain()
    records = [event.record for event in events if isinstance(event, IterationEvent)]
    assert tuple(records) == future.result(0).records


# -- closing ---------------------------------------------------------------------------------------------


def test_closing_finishes_what_runs_and_refuses_what_waits(made, requests, expected):
    serving = Stepped(made, slots=2)
    futures = [serving.submit(request) for request in requests[:6]]
    serving.step()
    assert futures[4].cancel()
    serving.close()
    assert not serving.alive
    assert [facts(future.result(0)) for future in futures[:2]] == expected[:2]
    for i in (2, 3, 5):
        with pytest.raises(EngineError, match="shut down"):
            futures[i].result(0)
    with pytest.raises(EngineError, match="shut down"):
        serving.submit(requests[7])
    with pytest.raises(EngineError, match="shut down"):
        Engine._between_steps(serving, lambda: None)
    assert empty(serving)
    assert serving.queued == 0


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


def test_an_engine_runs_on_at_most_the_threads_of_who_makes_it(made, monkeypatch):
    asked = []

    def choose(run, most):
        run()
        asked.append(most)
        return 1

    monkeypatch.setattr(engine_module, "fastest_threads", choose)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with Engine(made) as first, Engine(made) as second:  # the first one's choice does not bind the second
            assert (first.threads, second.threads, asked) == (1, 1, [3, 3])
        with Engine(made, threads=2) as third:
            assert third.threads == 2
        assert asked == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_threads_are_chosen_by_a_step_with_different_adapters_and_ways_on_these_threads(made, monkeypatch):
    seen, ran = [], []
    used, tuned = LoraBatch.use, LoraBatch.tune
    monkeypatch.setattr(LoraBatch, "use", lambda bank, rows: (ran.append(list(rows)), used(bank, rows))[1])
    monkeypatch.setattr(LoraBatch, "tune", lambda *args: (seen.append("tuned"), tuned(*args))[1])

    def choose(run, most):
        ran.clear()
        run()
        seen.append("chosen")
        return 1

    monkeypatch.setattr(engine_module, "fastest_threads", choose)
    with Engine(made, slots=6) as engine:
        assert seen[-2:] == ["chosen", "tuned"]
        count = engine._bank.count
        assert count > 1
        assert ran == [[row % count for row in range(6)]]


def test_an_engine_that_cannot_be_set_up_leaves_no_thread(made, monkeypatch):
    def fail(self, *_):
        raise MemoryError("no room for adapters")

    monkeypatch.setattr(LoraBatch, "fill", fail)
    with pytest.raises(MemoryError, match="no room"):
        Engine(made)
    assert own_threads() == []


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_idle_step_changes_nothing(kind, static):
    with Stepped(tiny.reasoner(kind), slots=3, static_shapes=static) as stepped:
        for rows, columns in ((1, 1), (3, 9), (99, 9999)):
            stepped._core.run_idle(rows, columns)
        assert empty(stepped)
        assert stepped.counters.steps == 0


def test_leaving_the_block_by_an_error_closes_it_too(made):
    def fail():
        with Engine(made) as serving:
            engines.append(serving)
            raise KeyError("inside")

    engines = []
    with pytest.raises(KeyError):
        fail()
    assert not engines[0].alive
