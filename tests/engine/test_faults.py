"""Faults: an error reaches only its request, and every future gets its outcome once."""

import asyncio
import weakref
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Replace
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from slr_core.engine import Engine, FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.sequence import Phase
from slr_core.errors import ConfigError, DeadlineError, EngineError, RequestError
from slr_core.generation.decoding import DecodeState
from slr_core.generation.reference import generate
from slr_core.params import LoopParams, SamplingParams
from tests import tiny
from tests.engine.harness import TIMEOUT, SteppedCore, facts, gated, is_empty, wait_until

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
    """A target request among others in a core. Hooks see which requests a pass runs."""

    def __init__(self, made, target, **options):
        self.made, self.request = made, target
        self.others = [tiny.request(made, prompt, **fixed(n)) for prompt, n in zip(OTHERS, (4, 2, 0), strict=True)]
        self.stepped = SteppedCore(made, **{"slots": 4, **options})
        # Others arrive before and after the target: its slot lies among theirs, and some move.
        self.futures = [self.stepped.submit(request) for request in self.others[:1]]
        self.future = self.stepped.submit(self.request)
        self.futures += [self.stepped.submit(request) for request in self.others[1:]]

    @property
    def target(self):
        """The target's sequence, while the core has it."""
        return self.stepped.sequence(self.future)

    def each_pass(self, act):
        """Call ``act(sequences, inputs)`` before each pass; inputs that it returns replace the pass's own."""
        core = self.stepped.core

        def hook(_, args, options):
            rows = [core.scheduler.running[slot] for slot in core.cache.row_slots.tolist()]
            embeds = act(rows, options["inputs_embeds"])
            return args, options if embeds is None else {**options, "inputs_embeds": embeds}

        self.stepped.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)

    def poison(self, phase, t=0):
        """Make the target's inputs NaN in one phase; in the loop, at iteration ``t``."""

        def act(rows, embeds):
            embeds = embeds.clone()
            for i, row in enumerate(rows):
                if row is self.target and row.phase is phase and (phase is not Phase.LOOP or row.t + 1 == t):
                    embeds[i] = torch.nan
            return embeds

        self.each_pass(act)

    def check_others(self):
        """Run to the end: the other answers are unchanged, and no slot holds anything."""
        self.stepped.drain()
        for future, request in zip(self.futures, self.others, strict=True):
            assert facts(future.result(0)) == alone(self.made, request)
        assert is_empty(self.stepped.core)
        # The next requests get clean slots.
        again = [self.stepped.submit(request) for request in self.others]
        self.stepped.drain()
        for future, request in zip(again, self.others, strict=True):
            assert facts(future.result(0)) == alone(self.made, request)


# -- states that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3])
def test_non_finite_loop_answers_from_last_good_state(made, t):
    target = tiny.request(made, TARGET, **fixed(5), trace=True)
    expected = generate(made, [tiny.request(made, TARGET, **fixed(t - 1))])[0]
    load = Load(made, target)
    load.poison(Phase.LOOP, t)
    load.stepped.until(lambda: load.target is not None and load.target.tracker.exit_reason is not None)
    cache, slot = load.stepped.core.cache, load.target.slot
    assert cache.store[..., : cache.capacity, :].isfinite().all()
    assert not cache.store[:, :, slot, :, load.target.filled : cache.capacity].any()
    load.check_others()
    result = load.future.result(0)
    assert (result.iterations, result.exit_reason) == (t, "diverged")
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
    assert result.records[-1].norm is None
    assert result.stability.converged is False
    assert load.stepped.counters.wasted_iterations == 1


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.CLOSE, Phase.DECODE])
def test_other_non_finite_values_stay_in_their_slot(made, phase):
    # The target gets a result or an error. Its values must not reach the slot's next request.
    target = tiny.request(made, TARGET, **fixed(2))
    load = Load(made, target, prefix_gib=0)
    load.poison(phase)
    load.check_others()
    assert load.future.done()


def test_non_finite_prefill_is_not_cached(chain):
    target = tiny.request(chain, tiny.words(*range(20)), **fixed(2))
    load = Load(chain, target)
    load.poison(Phase.PREFILL)
    load.check_others()
    again = load.stepped.submit(target)
    load.stepped.drain()
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
def test_error_of_a_pass_fails_one_request(made, phase, error, kind, message, caplog):
    if not made.workspace.prefills and phase is Phase.PREFILL:
        pytest.skip("no prefill")
    if made.workspace.closing_passes(1) == 0 and phase is Phase.CLOSE:
        pytest.skip("no closing pass")

    def act(rows, embeds):
        if any(row is load.target and row.phase is phase for row in rows):
            raise error

    load = Load(made, tiny.request(made, TARGET, **fixed(3)))
    load.each_pass(act)
    load.check_others()
    with pytest.raises(kind, match=message):
        load.future.result(0)
    assert "A request failed" in caplog.text


def test_error_of_the_head_fails_one_request(made, caplog):
    def broken(_, args):
        (hidden,) = args
        poisoned = load.target is not None and load.target.read_state is not None
        if poisoned and (hidden == load.target.read_state).all(-1).any():
            raise RuntimeError("the head broke")

    load = Load(made, tiny.request(made, TARGET, **fixed(3)))
    load.stepped.core.runner.head.register_forward_pre_hook(broken)
    load.stepped.drain()
    with pytest.raises(EngineError, match="the head broke"):
        load.future.result(0)
    assert [facts(future.result(0)) for future in load.futures] == [alone(made, request) for request in load.others]
    assert is_empty(load.stepped.core)


def test_error_of_the_latent_decoder_fails_one_request(monkeypatch, caplog):
    loop = {"decoder": {"answers": "latent_decoder", "latent_decoder": tiny.LATENT_DECODER}}
    made = tiny.reasoner(loop=loop)
    expected = [
        alone(made, tiny.request(made, prompt, **fixed(n))) for prompt, n in zip(OTHERS, (4, 2, 0), strict=True)
    ]
    real = made.decode_latent

    def broken(memory, present, ids):
        if (memory.flatten(1).abs().sum(1) > 0).any() and 5 in present.sum(-1).tolist():  # only the target has five
            raise RuntimeError("the decoder broke")
        return real(memory, present, ids)

    load = Load(made, tiny.request(made, TARGET, **fixed(5)))
    monkeypatch.setattr(made, "decode_latent", broken)
    load.stepped.drain()
    assert [facts(future.result(0)) for future in load.futures] == expected
    with pytest.raises(EngineError, match="the decoder broke"):
        load.future.result(0)
    assert is_empty(load.stepped.core)


def test_out_of_memory_falls_back_to_single_rows(made, caplog):
    def act(rows, embeds):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")

    target = tiny.request(made, TARGET, **fixed(3))
    load = Load(made, target)
    load.each_pass(act)
    load.check_others()
    assert facts(load.future.result(0)) == alone(made, target)
    assert "running each alone" in caplog.text


def test_pass_that_fails_after_writing_is_repeated(made):
    # Every pass of several rows fails at its end, when it has written to the cache.
    target = tiny.request(made, TARGET, **fixed(3))

    def late(_, args, output):
        if len(output.last_hidden_state) > 1:
            raise RuntimeError("too late")

    load = Load(made, target)
    load.stepped.model.base_model.register_forward_hook(late)
    load.check_others()
    assert facts(load.future.result(0)) == alone(made, target)


# -- callbacks -------------------------------------------------------------------------------------------


def test_error_of_an_event_callback(made, caplog):
    def broken(event):
        raise KeyError("broken callback")

    target = tiny.request(made, TARGET, **fixed(2))
    load = Load(made, tiny.request(made, tiny.PROMPTS[2], **fixed(1)))
    future = load.stepped.submit(target, on_event=broken)
    load.check_others()
    assert facts(future.result(0)) == alone(made, target)
    assert "broken callback" in caplog.text


def test_error_of_a_done_callback(chain):
    def broken(future):
        raise KeyError("broken callback")

    load = Load(chain, tiny.request(chain, TARGET, **fixed(2)))
    load.future.add_done_callback(broken)
    load.check_others()
    assert load.future.result(0).token_ids


# -- faults of the step itself ---------------------------------------------------------------------------


def broken_step(*_, **__):
    raise MemoryError("no step at all")


@pytest.mark.parametrize("part", ["schedule", "known", "leave"])
def test_error_of_a_step_fails_all_requests(chain, monkeypatch, part, caplog):
    with gated(chain, slots=2) as (engine, gate):
        requests = [tiny.request(chain, prompt, **fixed(i)) for i, prompt in enumerate(tiny.PROMPTS[:5], 2)]
        futures = [engine.submit(request) for request in requests]
        gate.release()
        wait_until(lambda: engine.counters.steps == 2)
        assert not any(future.done() for future in futures)
        scheduler = engine._core.scheduler
        if part == "leave":  # a request has its result then
            monkeypatch.setattr(engine._core, "_leave", broken_step)
        elif part == "known":  # in the middle of the queue
            monkeypatch.setattr(scheduler, "slots", 9)
            monkeypatch.setattr(scheduler, "_shares_running_prefill", broken_step)
        else:
            monkeypatch.setattr(scheduler, "schedule", broken_step)
        futures.append(engine.submit(requests[0]))
        gate.release(500)
        errors = [error for future in futures if (error := future.exception(TIMEOUT)) is not None]
        assert len(errors) == 6 if part != "leave" else 3 < len(errors) < 6
        assert {str(error) for error in errors} == {"the engine has failed: no step at all"}
        assert all(isinstance(error, EngineError) for error in errors)
        assert not engine.alive
        with pytest.raises(EngineError):
            engine.submit(requests[0])
        wait_until(lambda: (engine.queued, engine.in_flight) == (0, 0))


def test_error_of_a_step_fails_commands(chain, monkeypatch):
    with gated(chain) as (engine, gate):
        future, command = engine.submit(tiny.request(chain, TARGET, **fixed(2))), Future()

        def schedule():  # the command arrives during the step
            engine._thread._commands.append((lambda: None, command))
            broken_step()

        monkeypatch.setattr(engine._core.scheduler, "schedule", schedule)
        gate.release(500)
        for failed in (future, command):
            with pytest.raises(EngineError, match="no step at all"):
                failed.result(TIMEOUT)


# -- cancelling ------------------------------------------------------------------------------------------

PHASES = [Phase.PREFILL, Phase.LOOP, Phase.CLOSE, Phase.DECODE]


def reach(load, phase):
    """Step until the target is in the middle of a phase."""
    if phase is Phase.PREFILL:
        load.stepped.until(lambda: 0 < load.target.filled < 9)
    else:
        load.stepped.until(lambda: load.target.phase is phase and load.target.slot >= 0)
    assert load.target.phase is phase


def can(made, phase):
    if (phase is Phase.PREFILL and not made.workspace.prefills) or (
        phase is Phase.CLOSE and not made.workspace.closing_passes(1)
    ):
        pytest.skip("there is no such phase")


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_in_every_phase(made, phase):
    can(made, phase)
    load = Load(made, tiny.request(made, TARGET, **fixed(4)), prefill_chunk=4)
    reach(load, phase)
    assert load.future.cancel()
    load.stepped.step()
    assert load.target is None
    # `concurrent.futures.wait` is notified.
    assert wait([load.future], 0).done
    with pytest.raises(CancelledError):
        load.future.result(0)
    load.check_others()


@pytest.mark.parametrize("phase", PHASES)
def test_deadline_in_every_phase(made, phase):
    can(made, phase)
    load = Load(made, tiny.request(made, TARGET, **fixed(4)), prefill_chunk=4)
    reach(load, phase)
    load.target.deadline = 0.0
    load.stepped.step()
    assert load.target is None
    with pytest.raises(DeadlineError, match="deadline has passed"):
        load.future.result(0)
    load.check_others()


def test_expired_request_runs_no_pass(chain):
    stepped = SteppedCore(chain)
    future = stepped.submit(tiny.request(chain, TARGET, **fixed(2)), deadline=0.0)
    stepped.step()
    with pytest.raises(DeadlineError):
        future.result(0)
    assert stepped.counters.row_steps == 0
    assert is_empty(stepped.core)


def test_cancelled_waiting_request_never_runs(chain):
    stepped = SteppedCore(chain, slots=1)
    futures = [stepped.submit(tiny.request(chain, prompt, **fixed(2))) for prompt in tiny.PROMPTS[:5]]
    stepped.step()
    assert futures[1].cancel()
    assert futures[3].cancel()
    stepped.step()
    assert wait([futures[1], futures[3]], 0).done == {futures[1], futures[3]}
    stepped.drain()
    assert [future.cancelled() for future in futures] == [False, True, False, True, False]
    assert stepped.counters.iterations == 3 * 2
    assert is_empty(stepped.core)


def test_cancel_before_the_first_step(chain):
    stepped = SteppedCore(chain)
    gone, stays = [stepped.submit(tiny.request(chain, TARGET, **fixed(2))) for _ in range(2)]
    assert gone.cancel()
    stepped.drain()
    assert stays.result(0).token_ids
    assert stepped.counters.row_steps == stepped.counters.steps


def test_cancel_from_a_callback(chain):
    # The stepped's own thread gives it up, in the middle of a step.
    def cancel(event):
        if isinstance(event, IterationEvent) and event.record.t == 2:
            load.future.cancel()

    stepped = SteppedCore(chain)
    request = tiny.request(chain, TARGET, **fixed(5))
    load = SimpleNamespace()
    load.future = stepped.submit(request, on_event=cancel)
    stepped.drain()
    assert load.future.cancelled()
    assert stepped.counters.iterations == 2
    assert is_empty(stepped.core)


def test_finished_request_cannot_be_cancelled(chain):
    stepped = SteppedCore(chain)
    future = stepped.submit(tiny.request(chain, TARGET, **fixed(1)))
    stepped.drain()
    assert not future.cancel()
    assert future.result(0).token_ids


# -- loop adapter sets -------------------------------------------------------------------------------------------


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


def test_add_and_remove_sets_between_steps(chain, second, second_folder):
    ours, theirs = tiny.request(chain, TARGET, **fixed(4)), tiny.request(second, TARGET, **fixed(4))
    stepped = SteppedCore(chain, slots=4)
    first = stepped.submit(ours)
    stepped.step(2)
    added = LoopAdapterSet.load(chain, "second", second_folder)
    stepped.adapter_sets.add(added)
    assert added.reasoner.base is not chain.base
    shared = {parameter.data_ptr() for parameter in chain.base.parameters()}
    for name, parameter in added.reasoner.base.named_parameters():
        assert "lora_" in name or parameter.data_ptr() in shared
    others = [stepped.submit(theirs, loop_set="second") for _ in range(2)]
    stepped.step(3)
    stepped.remove("second")
    with pytest.raises(RequestError, match="loop_set must be one of default, got second") as caught:
        stepped.submit(theirs, loop_set="second")
    assert caught.value.param == "loop_set"
    last = stepped.submit(ours)
    stepped.drain()
    assert [facts(future.result(0)) for future in (first, last)] == [alone(chain, ours)] * 2
    assert [facts(future.result(0)) for future in others] == [alone(second, theirs)] * 2
    # The removed set's adapters are freed.
    assert stepped.lora_batch.count == len(chain.adapters.names)
    stepped.add("second", second)
    again = stepped.submit(theirs, loop_set="second")
    stepped.drain()
    assert facts(again.result(0)) == alone(second, theirs)
    assert is_empty(stepped.core)


def test_add_and_remove_sets_of_a_running_engine(chain, second, second_folder):
    ours, theirs = tiny.request(chain, TARGET, **fixed(4)), tiny.request(second, TARGET, **fixed(4))
    with Engine(chain, slots=3) as engine:
        futures = [engine.submit(ours) for _ in range(6)]
        engine.load_loop_set("second", second_folder)
        assert engine.prepare(TARGET, loop_params=theirs.loop, loop_set="second").max_new_tokens > 6
        others = [engine.submit(theirs, loop_set="second") for _ in range(6)]
        engine.remove_loop_set("second")
        engine.load_loop_set("third", second_folder)
        others += [engine.submit(theirs, loop_set="third") for _ in range(3)]
        assert [facts(future.result(TIMEOUT)) for future in futures] == [alone(chain, ours)] * 6
        assert [facts(future.result(TIMEOUT)) for future in others] == [alone(second, theirs)] * 9
        (result,) = engine.generate(TARGET, loop_params=LoopParams(**fixed(4)["loop"]), loop_set="third")
        assert facts(result) == alone(second, replace(theirs, max_new_tokens=tiny.POSITIONS - 9 - 3))


def test_leased_set_outlives_its_name(chain, second, second_folder, tmp_path):
    # Replaced under its name between the tokens of a request and its submission: adapters have other ids by then.
    third = tiny.reasoner(seed=9, plain=tiny.base())
    third.save_pretrained(str(tmp_path / "third"))
    with Engine(chain, slots=2) as engine:
        engine.load_loop_set("second", second_folder)
        found = engine.loop_sets["second"]
        with engine.lease_loop_set("second") as leased:
            assert leased is found
            loop = LoopParams(**fixed(4)["loop"])
            request = engine.prepare(TARGET, loop_params=loop, loop_set=leased, max_new_tokens=6)
            engine.remove_loop_set("second")
            engine.load_loop_set("second", str(tmp_path / "third"))
            future = engine.submit(request, loop_set=leased)
            replaced = engine.submit(request, loop_set="second")
        assert facts(future.result(TIMEOUT)) == alone(second, request) != alone(third, request)
        assert facts(replaced.result(TIMEOUT)) == alone(third, request)
        with pytest.raises(RequestError, match="second has been removed"):
            engine.submit(request, loop_set=found)


def test_end_of_a_lease_frees_a_removed_set(chain, second_folder):
    with Engine(chain, slots=2, threads=1) as engine:
        own = engine._lora_batch.count
        engine.load_loop_set("second", second_folder)
        with engine.lease_loop_set("second"):
            engine.remove_loop_set("second")
            assert engine._lora_batch.count > own
        engine._thread.call(lambda: None)  # what the lease's end has posted comes first
        assert engine._lora_batch.count == own


@pytest.mark.parametrize("case", ["weights", "shape", "architecture"])
def test_set_of_another_base_is_refused(chain, tmp_path, case):
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
        (result,) = engine.generate(TARGET, loop_params=LoopParams(**fixed(2)["loop"]), max_new_tokens=6)
    assert facts(result) == alone(chain, tiny.request(chain, TARGET, **fixed(2)))


def test_set_names_are_checked(chain, second_folder):
    with Engine(chain, slots=2) as engine:
        with pytest.raises(ConfigError, match="there is a loop adapter set 'default' already"):
            engine.load_loop_set("default", second_folder)
        for name in ("default", "unknown"):
            with pytest.raises(ConfigError, match=f"'{name}' is not a loop adapter set that can be removed"):
                engine.remove_loop_set(name)
        with pytest.raises(RequestError, match="loop_set must be one of default, got unknown"):
            engine.generate("w1", loop_set="unknown")


# -- tokenizers ------------------------------------------------------------------------------------------


BACKTRACKING = Regex("(a+)+$")


def test_panic_of_a_decoder_fails_one_request(chain):
    # Oniguruma gives up after ten million steps, and the tokenizer panics: that is no Exception.
    panicking = tiny.reasoner(seed=5, plain=tiny.base())
    words = {word: i for i, word in enumerate((*tiny.WORDS[:3], *("a" * (40 + i) + "b" for i in range(37))))}
    decoding = Tokenizer(WordLevel(words, unk_token="<unk>"))
    decoding.decoder = Replace(BACKTRACKING, "x")
    panicking.tokenizer = PreTrainedTokenizerFast(tokenizer_object=decoding, unk_token="<unk>")
    stepped = SteppedCore(chain, slots=2)
    stepped.add("panicking", panicking)
    request = tiny.request(chain, TARGET, **fixed(2))
    other, broken = stepped.submit(request), stepped.submit(replace(request, stop=("w",)), loop_set="panicking")
    stepped.drain()
    with pytest.raises(EngineError, match="retry-limit"):
        broken.result(0)
    assert facts(other.result(0)) == alone(chain, request)
    assert is_empty(stepped.core)


def test_base_exception_of_a_row_fails_one_request(chain, monkeypatch):
    load = Load(chain, tiny.request(chain, TARGET, **fixed(3)))
    real = DecodeState.choose_token

    def choose(state, *arguments):
        if state.request is load.request:
            raise SystemExit("not an Exception")
        return real(state, *arguments)

    monkeypatch.setattr(DecodeState, "choose_token", choose)
    load.stepped.drain()
    with pytest.raises(EngineError, match="not an Exception"):
        load.future.result(0)
    assert [facts(future.result(0)) for future in load.futures] == [alone(chain, request) for request in load.others]


# -- events ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("w1",), ("w2 w", "3 w")])
def test_events_are_in_order_and_complete(made, stop):
    requests = [
        tiny.request(made, prompt, **fixed(n), stop=stop, sampling=SamplingParams(temperature=2.0, seed=n))
        for n, prompt in enumerate(tiny.PROMPTS[:5])
    ]
    events = [[] for _ in requests]
    stepped = SteppedCore(made, slots=3)
    futures = [stepped.submit(r, on_event=received.append) for r, received in zip(requests, events, strict=True)]
    stepped.drain()
    for future, received in zip(futures, events, strict=True):
        result = future.result(0)
        tokens = len(result.token_ids)
        assert [type(event) for event in received] == [IterationEvent] * result.iterations + [TokenEvent] * tokens + [
            FinishedEvent
        ]
        assert tuple(event.token_id for event in received if isinstance(event, TokenEvent)) == result.token_ids
        assert "".join(event.text for event in received if isinstance(event, TokenEvent)) == result.text
        assert received[-1].result is result


def test_events_hold_whole_characters():
    made = tiny.reasoner(text={"max_new_tokens": 30})
    made.tokenizer = tiny.byte_tokenizer()
    texts = []
    stepped = SteppedCore(made, slots=8)
    for seed in range(8):
        received = []
        request = tiny.request(
            made, "abc", **fixed(1, 30), stop=("é", "ab"), sampling=SamplingParams(temperature=9.0, seed=seed)
        )
        future = stepped.submit(request, on_event=received.append)
        texts.append((future, received))
    stepped.drain()
    for future, received in texts:
        assert "".join(event.text for event in received if isinstance(event, TokenEvent)) == future.result(0).text
    assert any("\ufffd" in future.result(0).text for future, _ in texts)


# -- errors that are no Exception ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [SystemExit(3), KeyboardInterrupt(), CancelledError(), asyncio.CancelledError()])
def test_base_exception_of_a_callback(chain, fault):
    def fail(*_):
        raise fault

    request = tiny.request(chain, TARGET, **fixed(3))
    with Engine(chain, slots=2, on_step=fail) as engine:
        futures = [engine.submit(request, on_event=fail) for _ in range(3)]
        assert [facts(future.result(TIMEOUT)) for future in futures] == [alone(chain, request)] * 3
        with pytest.raises(type(fault)):
            engine._thread.call(fail)
        assert engine.alive


def test_base_exception_of_a_step(chain, monkeypatch):
    def fail():
        raise SystemExit(3)

    with Engine(chain, slots=2) as engine:
        monkeypatch.setattr(engine._core, "step", fail)
        future = engine.submit(tiny.request(chain, TARGET, **fixed(3)))
        with pytest.raises(EngineError, match="the engine has failed"):
            future.result(TIMEOUT)
        wait_until(lambda: not engine.alive)
        assert not engine.alive
        with pytest.raises(EngineError, match="shut down"):
            engine.submit(tiny.request(chain, TARGET, **fixed(3)))


def test_failed_pass_frees_its_memory_before_the_fallback(chain):
    tensors, alive = [], []

    def fail(rows, embeds):
        alive.append([reference() is not None for reference in tensors])
        if len(rows) > 1:
            large = embeds.repeat(1, 1, 1)
            tensors.append(weakref.ref(large))
            raise torch.OutOfMemoryError("no room")

    load = Load(chain, tiny.request(chain, TARGET, **fixed(3)))
    load.each_pass(fail)
    load.stepped.step()
    assert len(alive) > 2
    assert not any(any(seen) for seen in alive[1:])
