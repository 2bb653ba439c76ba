"""What goes wrong, and whom it reaches: a fault is its request's alone, and everyone waits for an answer once."""

import asyncio
import weakref
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace

import pytest
import torch

from slr_core.engine import Engine, FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.sequence import Phase
from slr_core.errors import ConfigError, DeadlineError, EngineError, RequestError
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams
from tests import tiny
from tests.engine.stepped import TIMEOUT, Stepped, empty, facts

WORKSPACES = tuple(tiny.WORKSPACES)
TARGET = tiny.PROMPTS[3]
OTHERS = (tiny.PROMPTS[1], tiny.PROMPTS[5], tiny.PROMPTS[0])


def fixed(iterations, tokens=6):
    return {"loop": {"max_iterations": iterations, "criterion": "fixed"}, "max_new_tokens": tokens}


@pytest.fixture(scope="module", params=WORKSPACES)
def made(request):
    return tiny.reasoner(loop=tiny.WORKSPACES[request.param], decode=True, text={"answer_prefix": "w7 w8"})


@pytest.fixture(scope="module")
def chain():
    return tiny.reasoner()


def alone(made, request):
    return facts(generate(made, [request])[0])


class Load:
    """A request among others in an engine that stands still; hooks see which requests a pass runs."""

    def __init__(self, made, target, **options):
        self.made, self.request = made, target
        self.others = [tiny.request(made, prompt, **fixed(n)) for prompt, n in zip(OTHERS, (4, 2, 0), strict=True)]
        self.engine = Stepped(made, **{"slots": 4, **options})

    def __enter__(self):
        # Before the target and after it: its slot lies among the others', and some move.
        self.futures = [self.engine.submit(request) for request in self.others[:1]]
        self.future = self.engine.submit(self.request)
        self.futures += [self.engine.submit(request) for request in self.others[1:]]
        return self

    def __exit__(self, *_):
        self.engine.close()

    @property
    def target(self):
        """The target as the engine has it."""
        return self.engine.sequence(self.future)

    def each_pass(self, act):
        """Call ``act(sequences, inputs)`` before each pass; what it returns is run in place of its inputs."""
        core = self.engine._core

        def hook(_, args, options):
            rows = [core.scheduler.running[slot] for slot in core.cache.rows.tolist()]
            embeds = act(rows, options["inputs_embeds"])
            return args, options if embeds is None else {**options, "inputs_embeds": embeds}

        self.engine.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)

    def poison(self, phase, t=0):
        """Spoil what the target feeds in one phase, at iteration ``t`` where it loops."""

        def act(rows, embeds):
            embeds = embeds.clone()
            for i, row in enumerate(rows):
                if row is self.target and row.phase is phase and (phase is not Phase.LOOP or row.t + 1 == t):
                    embeds[i] = torch.nan
            return embeds

        self.each_pass(act)

    def check_the_others(self):
        """Run to the end: nobody else noticed, and nothing is left behind."""
        self.engine.drain()
        for future, request in zip(self.futures, self.others, strict=True):
            assert facts(future.result(0)) == alone(self.made, request)
        assert empty(self.engine)
        assert self.engine.alive
        # Whoever comes next finds a clean slot.
        again = [self.engine.submit(request) for request in self.others]
        self.engine.drain()
        for future, request in zip(again, self.others, strict=True):
            assert facts(future.result(0)) == alone(self.made, request)


# -- states that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3])
def test_a_loop_that_leaves_the_numbers_ends_there_and_answers_from_its_last_good_state(made, t):
    target = tiny.request(made, TARGET, **fixed(5), trace=True)
    expected = generate(made, [tiny.request(made, TARGET, **fixed(t - 1))])[0]
    with Load(made, target) as load:
        load.poison(Phase.LOOP, t)
        load.engine.until(lambda: load.target is not None and load.target.row.exit_reason is not None)
        cache, slot = load.engine._core.cache, load.target.slot
        assert cache.store[..., : cache.capacity, :].isfinite().all()
        assert not cache.store[:, :, slot, :, load.target.filled : cache.capacity].any()
        load.check_the_others()
        result = load.future.result(0)
    assert (result.iterations, result.exit_reason) == (t, "diverged")
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
    assert result.records[-1].norm is None
    assert result.stability.converged is False
    assert load.engine.counters.wasted_iterations == 1


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.CLOSE, Phase.DECODE])
def test_what_is_not_finite_elsewhere_stays_in_its_slot_too(made, phase):
    # Something comes of it or an error does; it must not stay for the next one.
    target = tiny.request(made, TARGET, **fixed(2))
    with Load(made, target, prefix_gib=0) as load:
        load.poison(phase)
        load.check_the_others()
        assert load.future.done()


def test_a_prompt_whose_prefill_was_spoiled_is_not_kept_for_the_next(chain):
    target = tiny.request(chain, tiny.words(*range(20)), **fixed(2))
    with Load(chain, target) as load:
        load.poison(Phase.PREFILL)
        load.check_the_others()
        again = load.engine.submit(target)
        load.engine.drain()
        assert facts(again.result(0)) == alone(chain, target)


# -- passes that raise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.LOOP, Phase.CLOSE, Phase.DECODE])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("a kernel broke"), EngineError, "the request failed: a kernel broke"),
        (RequestError("cannot", param="prompt"), RequestError, "cannot"),
    ],
    ids=["runtime", "own"],
)
def test_a_pass_that_raises_for_one_fails_it_alone(made, phase, error, kind, message, caplog):
    if not made.workspace.prefills and phase is Phase.PREFILL:
        pytest.skip("nothing is prefilled")
    if made.workspace.closing_passes(1) == 0 and phase is Phase.CLOSE:
        pytest.skip("nothing is closed")

    def act(rows, embeds):
        if any(row is load.target and row.phase is phase for row in rows):
            raise error

    with Load(made, tiny.request(made, TARGET, **fixed(3))) as load:
        load.each_pass(act)
        load.check_the_others()
        with pytest.raises(kind, match=message):
            load.future.result(0)
    assert "a request failed" in caplog.text


def test_what_fails_in_reading_the_head_fails_alone_too(made, caplog):
    def broken(_, args):
        (hidden,) = args
        poisoned = load.target is not None and load.target.state is not None
        if poisoned and (hidden == load.target.state).all(-1).any():
            raise RuntimeError("the head broke")

    with Load(made, tiny.request(made, TARGET, **fixed(3))) as load:
        load.engine._core.head.register_forward_pre_hook(broken)
        load.engine.drain()
        with pytest.raises(EngineError, match="the head broke"):
            load.future.result(0)
        assert [facts(future.result(0)) for future in load.futures] == [alone(made, request) for request in load.others]
        assert empty(load.engine)


def test_a_latent_decoder_that_raises_for_one_fails_it_alone(monkeypatch, caplog):
    loop = {"decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}}
    made = tiny.reasoner(loop=loop)
    expected = [
        alone(made, tiny.request(made, prompt, **fixed(n))) for prompt, n in zip(OTHERS, (4, 2, 0), strict=True)
    ]
    real = made.decode_latent

    def broken(memory, present, ids):
        if (memory.flatten(1).abs().sum(1) > 0).any() and 5 in present.sum(-1).tolist():  # the target alone has five
            raise RuntimeError("the decoder broke")
        return real(memory, present, ids)

    with Load(made, tiny.request(made, TARGET, **fixed(5))) as load:
        monkeypatch.setattr(made, "decode_latent", broken)
        load.engine.drain()
        assert [facts(future.result(0)) for future in load.futures] == expected
        with pytest.raises(EngineError, match="the decoder broke"):
            load.future.result(0)
        assert empty(load.engine)


def test_running_out_of_memory_is_survived_row_by_row(made, caplog):
    def act(rows, embeds):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")

    target = tiny.request(made, TARGET, **fixed(3))
    with Load(made, target) as load:
        load.each_pass(act)
        load.check_the_others()
        assert facts(load.future.result(0)) == alone(made, target)
    assert "running each alone" in caplog.text


def test_a_pass_that_breaks_after_it_wrote_its_columns_can_be_run_again(made):
    # The first attempt of every mixed pass fails at its end: the cache has been written by then.
    target = tiny.request(made, TARGET, **fixed(3))

    def late(_, args, output):
        if len(output.last_hidden_state) > 1:
            raise RuntimeError("too late")

    with Load(made, target) as load:
        load.engine.model.base_model.register_forward_hook(late)
        load.check_the_others()
        assert facts(load.future.result(0)) == alone(made, target)


# -- listeners -------------------------------------------------------------------------------------------


def test_a_listener_that_raises_harms_nobody(made, caplog):
    def broken(event):
        raise KeyError("who listens")

    target = tiny.request(made, TARGET, **fixed(2))
    with Load(made, tiny.request(made, tiny.PROMPTS[2], **fixed(1))) as load:
        future = load.engine.submit(target, on_event=broken)
        load.check_the_others()
        assert facts(future.result(0)) == alone(made, target)
    assert "who listens" in caplog.text


def test_a_future_whose_callback_raises_harms_nobody(chain):
    def broken(future):
        raise KeyError("who waits")

    with Load(chain, tiny.request(chain, TARGET, **fixed(2))) as load:
        load.future.add_done_callback(broken)
        load.check_the_others()
        assert load.future.result(0).token_ids


# -- faults of the step itself ---------------------------------------------------------------------------


def broken_step(*_, **__):
    raise MemoryError("no step at all")


@pytest.mark.parametrize("part", ["schedule", "known", "leave"])
def test_a_fault_beyond_the_requests_is_told_to_everyone_at_once(chain, monkeypatch, part, caplog):
    with Stepped(chain, slots=2) as engine:
        requests = [tiny.request(chain, prompt, **fixed(i)) for i, prompt in enumerate(tiny.PROMPTS[:5])]
        futures = [engine.submit(request) for request in requests]
        engine.step(2)
        assert not any(future.done() for future in futures[1:])
        scheduler = engine._core.scheduler
        if part == "leave":
            # It breaks when somebody has an answer already.
            monkeypatch.setattr(engine._core, "_leave", broken_step)
            engine.until(lambda: not engine.alive)
        else:
            if part == "known":
                # Half way through the queue.
                monkeypatch.setattr(scheduler, "slots", 9)
                monkeypatch.setattr(scheduler, "_prefix_under_way", broken_step)
            else:
                monkeypatch.setattr(scheduler, "schedule", broken_step)
            futures.append(engine.submit(requests[0]))
            engine.step()
        engine._thread.join(TIMEOUT)
        assert not engine.alive
        told = [future for future in futures if isinstance(future.exception(0), EngineError)]
        assert len(told) >= 3
        for future in futures:
            if future not in told:
                assert future.result(0).token_ids
            else:
                assert "the engine has failed: no step at all" in str(future.exception(0))
        with pytest.raises(EngineError):
            engine.submit(requests[0])
        assert (engine.queued, engine.in_flight) == (0, 0)


def test_who_waits_to_change_the_loop_sets_hears_of_a_fault_too(chain, monkeypatch):
    with Stepped(chain) as engine:
        future = engine.submit(tiny.request(chain, TARGET, **fixed(2)))
        waiting = Future()

        def schedule():
            engine._commands.append((lambda: None, waiting))
            broken_step()

        monkeypatch.setattr(engine._core.scheduler, "schedule", schedule)
        engine.step()
        engine._thread.join(TIMEOUT)
        for told in (future, waiting):
            with pytest.raises(EngineError, match="no step at all"):
                told.result(TIMEOUT)


# -- giving up -------------------------------------------------------------------------------------------

PHASES = [Phase.PREFILL, Phase.LOOP, Phase.CLOSE, Phase.DECODE]


def reach(load, phase):
    """Step until the target is in the middle of a phase."""
    if phase is Phase.PREFILL:
        load.engine.until(lambda: 0 < load.target.filled < 9)
    else:
        load.engine.until(lambda: load.target.phase is phase and load.target.slot >= 0)
    assert load.target.phase is phase


def can(made, phase):
    if (phase is Phase.PREFILL and not made.workspace.prefills) or (
        phase is Phase.CLOSE and not made.workspace.closing_passes(1)
    ):
        pytest.skip("there is no such phase")


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_can_be_cancelled_whatever_it_does(made, phase):
    can(made, phase)
    with Load(made, tiny.request(made, TARGET, **fixed(4)), prefill_chunk=4) as load:
        reach(load, phase)
        assert load.future.cancel()
        load.engine.step()
        assert load.target is None
        # Those who wait for several futures hear of it as well.
        assert wait([load.future], 0).done
        with pytest.raises(CancelledError):
            load.future.result(0)
        load.check_the_others()


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_that_passes_ends_it_whatever_it_does(made, phase):
    can(made, phase)
    with Load(made, tiny.request(made, TARGET, **fixed(4)), prefill_chunk=4) as load:
        reach(load, phase)
        load.target.deadline = 0.0
        load.engine.step()
        assert load.target is None
        with pytest.raises(DeadlineError, match="deadline has passed"):
            load.future.result(0)
        load.check_the_others()


def test_a_deadline_that_has_passed_already_costs_no_pass(chain):
    with Stepped(chain) as engine:
        future = engine.submit(tiny.request(chain, TARGET, **fixed(2)), deadline=0.0)
        engine.step()
        with pytest.raises(DeadlineError):
            future.result(0)
        assert engine.counters.row_steps == 0
        assert empty(engine)


def test_who_waits_can_be_cancelled_and_never_runs(chain):
    with Stepped(chain, slots=1) as engine:
        futures = [engine.submit(tiny.request(chain, prompt, **fixed(2))) for prompt in tiny.PROMPTS[:5]]
        engine.step()
        assert futures[1].cancel()
        assert futures[3].cancel()
        assert engine.queued == 2
        engine.step()
        assert wait([futures[1], futures[3]], 0).done == {futures[1], futures[3]}
        engine.drain()
        assert [future.cancelled() for future in futures] == [False, True, False, True, False]
        assert engine.counters.iterations == 3 * 2
        assert empty(engine)


def test_cancelling_before_the_engine_has_looked(chain):
    with Stepped(chain) as engine:
        gone, stays = [engine.submit(tiny.request(chain, TARGET, **fixed(2))) for _ in range(2)]
        assert gone.cancel()
        assert engine.queued == 1
        engine.drain()
        assert stays.result(0).token_ids
        assert engine.counters.row_steps == engine.counters.steps


def test_cancelling_from_a_listener(chain):
    # The engine's own thread gives it up, in the middle of a step.
    def hear(event):
        if isinstance(event, IterationEvent) and event.record.t == 2:
            load.future.cancel()

    with Stepped(chain) as engine:
        request = tiny.request(chain, TARGET, **fixed(5))
        load = type("Told", (), {})()
        load.future = engine.submit(request, on_event=hear)
        engine.drain()
        assert load.future.cancelled()
        assert engine.counters.iterations == 2
        assert empty(engine)


def test_an_answer_that_is_there_cannot_be_cancelled(chain):
    with Stepped(chain) as engine:
        future = engine.submit(tiny.request(chain, TARGET, **fixed(1)))
        engine.drain()
        assert not future.cancel()
        assert future.result(0).token_ids


# -- loop sets -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second():
    """Another loop on the same base: other adapters, another workspace."""
    loop = {**tiny.WORKSPACES["block"], "lora": {"rank": 3}, "trained_iterations": 2}
    return tiny.reasoner(loop=loop, seed=5, plain=tiny.base(), decode=True)


@pytest.fixture(scope="module")
def second_folder(second, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("second") / "checkpoint")
    second.save_pretrained(folder)
    return folder


def test_loop_sets_come_and_go_while_others_run(chain, second, second_folder):
    ours, theirs = tiny.request(chain, TARGET, **fixed(4)), tiny.request(second, TARGET, **fixed(4))
    with Stepped(chain, slots=4) as engine:
        first = engine.submit(ours)
        engine.step(2)
        engine.load_loop_set("second", second_folder)
        assert engine.loop_sets["second"].reasoner.base is not chain.base
        mine = {parameter.data_ptr() for parameter in chain.base.parameters()}
        for name, parameter in engine.loop_sets["second"].reasoner.base.named_parameters():
            assert "lora_" in name or parameter.data_ptr() in mine
        others = [engine.submit(theirs, loop_set="second") for _ in range(2)]
        engine.step(3)
        assert engine.prepare(TARGET, theirs.loop, loop_set="second").max_new_tokens > 6
        engine.remove_loop_set("second")
        with pytest.raises(RequestError, match="loop_set must be one of default, got second") as caught:
            engine.submit(theirs, loop_set="second")
        assert caught.value.param == "loop_set"
        last = engine.submit(ours)
        engine.drain()
        assert [facts(future.result(0)) for future in (first, last)] == [alone(chain, ours)] * 2
        assert [facts(future.result(0)) for future in others] == [alone(second, theirs)] * 2
        # Their weights are held no longer.
        assert engine._bank.count == len(chain.adapters.names)
        engine.load_loop_set("second", second_folder)
        again = engine.submit(theirs, loop_set="second")
        engine.drain()
        assert facts(again.result(0)) == alone(second, theirs)
        assert empty(engine)


def test_loop_sets_change_on_an_engine_that_is_at_work(chain, second, second_folder):
    # The same with a thread that runs freely.
    ours, theirs = tiny.request(chain, TARGET, **fixed(4)), tiny.request(second, TARGET, **fixed(4))
    with Engine(chain, slots=3) as engine:
        futures = [engine.submit(ours) for _ in range(6)]
        engine.load_loop_set("second", second_folder)
        others = [engine.submit(theirs, loop_set="second") for _ in range(6)]
        engine.remove_loop_set("second")
        engine.load_loop_set("third", second_folder)
        others += [engine.submit(theirs, loop_set="third") for _ in range(3)]
        assert [facts(future.result(TIMEOUT)) for future in futures] == [alone(chain, ours)] * 6
        assert [facts(future.result(TIMEOUT)) for future in others] == [alone(second, theirs)] * 9
        assert [facts(r) for r in engine.generate(TARGET, loop_set="third", max_iterations=4, criterion="fixed")] == [
            alone(second, replace(theirs, max_new_tokens=tiny.POSITIONS - 9 - 3))
        ]


def test_a_request_that_comes_as_its_loop_set_goes_is_refused(chain, second, monkeypatch):
    # Between looking a set up and queueing, it is removed: its places in the bank are somebody else's by now.
    with Stepped(chain) as engine:
        engine.add("second", second)
        found = engine.loop_sets["second"]
        engine.remove_loop_set("second")
        monkeypatch.setattr(engine._loops, "find", lambda name: found)
        with pytest.raises(RequestError, match="removed"):
            engine.submit(tiny.request(second, TARGET, **fixed(2)), loop_set="second")


@pytest.mark.parametrize("case", ["weights", "shape", "architecture"])
def test_a_loop_on_another_base_is_refused(chain, tmp_path, case):
    plain, kind = tiny.base(seed=3 if case == "weights" else 0), "llama"
    if case == "shape":
        plain.resize_token_embeddings(48)
    if case == "architecture":
        plain, kind = tiny.base("qwen2"), "qwen2"
    tiny.reasoner(kind, plain=plain).save_pretrained(str(tmp_path / "other"))
    with Engine(chain, slots=2) as engine:
        with pytest.raises(ConfigError, match="base model is not the one"):
            engine.load_loop_set("other", str(tmp_path / "other"))
        assert set(engine.loop_sets) == {"default"}
        (result,) = engine.generate(TARGET, max_iterations=2, criterion="fixed", max_new_tokens=6)
    assert facts(result) == alone(chain, tiny.request(chain, TARGET, **fixed(2)))


def test_names_of_loop_sets_are_checked(chain, second_folder):
    with Stepped(chain) as engine:
        with pytest.raises(ConfigError, match="there is a loop set 'default' already"):
            engine.load_loop_set("default", second_folder)
        for name in ("default", "nobody"):
            with pytest.raises(ConfigError, match=f"'{name}' is not a loop set that can be removed"):
                engine.remove_loop_set(name)
        with pytest.raises(RequestError, match="loop_set must be one of default, got nobody"):
            engine.generate("w1", loop_set="nobody")


# -- events ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("w1",), ("w2 w", "3 w")])
def test_events_come_in_order_and_their_texts_are_the_answer(made, stop):
    requests = [
        tiny.request(made, prompt, **fixed(n), stop=stop, sampling=SamplingParams(temperature=2.0, seed=n))
        for n, prompt in enumerate(tiny.PROMPTS[:5])
    ]
    events = [[] for _ in requests]
    with Stepped(made, slots=3) as engine:
        futures = [engine.submit(r, on_event=heard.append) for r, heard in zip(requests, events, strict=True)]
        engine.drain()
    for future, heard in zip(futures, events, strict=True):
        result = future.result(0)
        tokens = len(result.token_ids)
        assert [type(event) for event in heard] == [IterationEvent] * result.iterations + [TokenEvent] * tokens + [
            FinishedEvent
        ]
        assert tuple(event.token_id for event in heard if isinstance(event, TokenEvent)) == result.token_ids
        assert "".join(event.text for event in heard if isinstance(event, TokenEvent)) == result.text
        assert heard[-1].result is result


def test_characters_of_several_bytes_are_told_whole():
    made = tiny.reasoner(text={"max_new_tokens": 30})
    made.tokenizer = tiny.byte_tokenizer()
    texts = []
    with Stepped(made, slots=8) as engine:
        for seed in range(8):
            heard = []
            request = tiny.request(
                made, "abc", **fixed(1, 30), stop=("é", "ab"), sampling=SamplingParams(temperature=9.0, seed=seed)
            )
            future = engine.submit(request, on_event=heard.append)
            texts.append((future, heard))
        engine.drain()
    for future, heard in texts:
        assert "".join(event.text for event in heard if isinstance(event, TokenEvent)) == future.result(0).text
    assert any("\ufffd" in future.result(0).text for future, _ in texts)


# -- streams ---------------------------------------------------------------------------------------------


async def following(engine, request, count, **options):
    """Up to so many events of a stream, stepping the engine for each; it is left then."""
    events, stream = [], engine.stream(request, **options)
    while len(events) < count:
        ahead = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(0)
        while not ahead.done():
            if engine._arrived or engine._core.busy:
                engine.step()
            await asyncio.sleep(0)
        if (event := await ahead) is None:
            break
        events.append(event)
    await stream.aclose()
    return events


def test_a_stream_has_every_event(chain):
    request = tiny.request(chain, TARGET, **fixed(3))
    with Stepped(chain) as engine:
        events = asyncio.run(following(engine, request, 100))
        assert empty(engine)
    assert [type(event).__name__ for event in events] == ["IterationEvent"] * 3 + ["TokenEvent"] * 6 + ["FinishedEvent"]
    assert facts(events[-1].result) == alone(chain, request)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_leaving_a_stream_early_frees_its_slot(chain, count):
    with Stepped(chain) as engine:
        events = asyncio.run(following(engine, tiny.request(chain, TARGET, **fixed(3)), count))
        assert len(events) == count
        if engine._arrived or engine._core.busy:
            engine.step()
        assert empty(engine)
        assert engine.counters.tokens < 6


def test_a_stream_ends_with_the_error_of_its_request(chain):
    with Stepped(chain) as engine:
        with pytest.raises(DeadlineError):
            asyncio.run(following(engine, tiny.request(chain, TARGET, **fixed(3)), 100, deadline=0.0))
        with pytest.raises(RequestError, match="loop_set"):
            asyncio.run(following(engine, tiny.request(chain, TARGET, **fixed(3)), 100, loop_set="nobody"))
    with pytest.raises(EngineError, match="shut down"):
        asyncio.run(following(engine, tiny.request(chain, TARGET, **fixed(3)), 100))


def test_a_task_that_is_cancelled_drops_its_request(chain):
    async def main(engine):
        async def listen():
            async for _ in engine.stream(tiny.request(chain, TARGET, **fixed(3))):
                pass

        task = asyncio.ensure_future(listen())
        await asyncio.sleep(0)
        engine.step(2)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        engine.step()
        assert empty(engine)

    with Stepped(chain) as engine:
        asyncio.run(main(engine))


def test_streams_of_a_free_engine(chain):
    requests = [tiny.request(chain, prompt, **fixed(n)) for n, prompt in enumerate(tiny.PROMPTS[:6])]

    async def last(engine, request):
        *_, event = [event async for event in engine.stream(request)]
        return facts(event.result)

    async def main(engine):
        return await asyncio.gather(*[last(engine, request) for request in requests])

    with Engine(chain, slots=3) as engine:
        assert asyncio.run(main(engine)) == [alone(chain, request) for request in requests]


# -- what is not an Exception ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [SystemExit(3), KeyboardInterrupt(), CancelledError(), asyncio.CancelledError()])
def test_a_listener_that_would_end_its_thread_ends_nothing(chain, fault):
    def fail(*_):
        raise fault

    request = tiny.request(chain, TARGET, **fixed(3))
    with Engine(chain, slots=2, on_step=fail) as engine:
        futures = [engine.submit(request, on_event=fail) for _ in range(3)]
        assert [facts(future.result(TIMEOUT)) for future in futures] == [alone(chain, request)] * 3
        with pytest.raises(type(fault)):
            engine._between_steps(fail)
        assert engine.alive


def test_who_waits_hears_of_whatever_ends_the_engine(chain, monkeypatch):
    def fail():
        raise SystemExit(3)

    with Engine(chain, slots=2) as engine:
        monkeypatch.setattr(engine._core, "step", fail)
        future = engine.submit(tiny.request(chain, TARGET, **fixed(3)))
        with pytest.raises(EngineError, match="the engine has failed"):
            future.result(TIMEOUT)
        engine._thread.join(TIMEOUT)
        assert not engine.alive
        with pytest.raises(EngineError, match="shut down"):
            engine.submit(tiny.request(chain, TARGET, **fixed(3)))


def test_a_pass_that_found_no_memory_has_let_go_of_it_when_its_rows_run_alone(chain):
    held, alive = [], []

    def fail(rows, embeds):
        alive.append([reference() is not None for reference in held])
        if len(rows) > 1:
            large = embeds.repeat(1, 1, 1)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("no room")

    with Load(chain, tiny.request(chain, TARGET, **fixed(3))) as load:
        load.each_pass(fail)
        load.engine.step()
        assert len(alive) > 2
        assert not any(any(seen) for seen in alive[1:])
