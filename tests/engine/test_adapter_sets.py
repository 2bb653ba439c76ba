"""Loop sets that come and go: a change of the bank happens as a whole or not at all."""

from dataclasses import replace

import pytest
import torch

from slr_core.engine import Engine
from slr_core.engine import engine as engine_module
from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.runner import lora_batch as bank
from slr_core.errors import CheckpointError, ConfigError
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.stepped import TIMEOUT, Stepped, facts

ASKED = tiny.PROMPTS[3]
LOOP = {"loop": {"max_iterations": 4, "criterion": "fixed"}, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


@pytest.fixture(scope="module")
def others(made):
    """Loops on the same base, by name, whose adapters differ."""
    return {name: tiny.reasoner(seed=seed, plain=tiny.base()) for seed, name in enumerate("abc", 5)}


def asked(reasoner):
    request = tiny.request(reasoner, ASKED, **LOOP)
    return request, facts(generate(reasoner, [request])[0])


def fail_after(monkeypatch, layers):
    """Let memory for a layer's adapters run out; returns how to end that."""
    made = bank._held
    left = [layers]

    def held(wanted):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no room for adapters")
        return made(wanted)

    monkeypatch.setattr(bank, "_held", held)
    return lambda: monkeypatch.setattr(bank, "_held", made)


def test_a_load_that_finds_no_memory_leaves_everything_as_it_was(made, others, monkeypatch):
    with Stepped(made, slots=4) as engine:
        engine.add("a", others["a"])
        (ours, our_answer), (theirs, their_answer) = asked(made), asked(others["a"])
        running = [engine.submit(ours), engine.submit(theirs, loop_set="a")]
        engine.step(2)
        enough = fail_after(monkeypatch, 5)
        with pytest.raises(torch.OutOfMemoryError):
            engine.add("b", others["b"])
        assert list(engine.loop_sets) == ["default", "a"]
        enough()
        engine.drain()
        assert [facts(future.result(0)) for future in running] == [our_answer, their_answer]
        engine.add("b", others["b"])  # the name is free
        request, answer = asked(others["b"])
        future = engine.submit(request, loop_set="b")
        engine.drain()
        assert facts(future.result(0)) == answer


def test_a_removal_that_finds_no_memory_changes_nobody_elses_answers(made, others, monkeypatch, caplog):
    with Stepped(made, slots=4) as engine:
        for name in "ab":
            engine.add(name, others[name])
        request, answer = asked(others["b"])
        enough = fail_after(monkeypatch, 5)
        engine.remove_loop_set("a")
        assert "stay until the next change" in caplog.text
        future = engine.submit(request, loop_set="b")
        engine.drain()
        assert facts(future.result(0)) == answer
        enough()
        engine.add("c", others["c"])
        assert {loops.name for loops in engine._loops.held} == {"default", "b", "c"}  # now they are gone
        for name in "bc":
            request, answer = asked(others[name])
            future = engine.submit(request, loop_set=name)
            engine.drain()
            assert facts(future.result(0)) == answer


def test_adapters_of_a_removed_loop_set_go_with_the_last_who_runs_it(made, others, monkeypatch):
    with Stepped(made, slots=4) as engine:
        engine.add("a", others["a"])
        request, answer = asked(others["a"])
        future = engine.submit(request, loop_set="a")
        engine.step()
        engine.remove_loop_set("a")
        assert {loops.name for loops in engine._loops.held} == {"default", "a"}
        enough = fail_after(monkeypatch, 5)
        engine.drain()  # no memory to let them go: nobody waits for that
        assert facts(future.result(0)) == answer
        assert engine.alive
        enough()


def test_a_name_is_given_once_whoever_is_first(made, others):
    with Stepped(made, slots=2) as engine:
        engine.add("a", others["a"])
        first = engine.loop_sets["a"]
        with pytest.raises(ConfigError, match="there is a loop set 'a' already"):
            engine._loops.add(LoopAdapterSet("a", others["b"]))
        assert engine.loop_sets["a"] is first


def test_whoever_loads_lets_its_workers_go_also_where_that_fails(made, monkeypatch, tmp_path):
    released = []
    with Engine(made, slots=2) as engine:
        monkeypatch.setattr(engine_module, "release_workers", lambda: released.append(1))
        with pytest.raises(CheckpointError):
            engine.load_loop_set("a", str(tmp_path / "nowhere"))
        assert released == [1]
        tiny.reasoner(plain=tiny.base()).save_pretrained(str(tmp_path / "a"))
        engine.load_loop_set("a", str(tmp_path / "a"))
        assert released == [1, 1]


def test_an_engine_refuses_adapters_of_its_own_that_are_not_finite():
    spoilt = tiny.reasoner()
    with torch.no_grad():
        next(p for name, p in spoilt.base.named_parameters() if "lora_B" in name)[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="not finite"):
        Engine(spoilt)


@pytest.mark.parametrize(
    "wait",
    [
        lambda engine: engine.remove_loop_set("a"),
        lambda engine: engine.generate("w1"),
        lambda engine: engine._between_steps(lambda: None),
    ],
)
def test_a_listener_that_would_wait_for_its_own_engine_is_told(made, others, tmp_path, wait):
    others["a"].save_pretrained(str(tmp_path / "a"))
    told = []

    def listen(_):
        with pytest.raises(Exception, match="must not wait for the engine") as caught:
            wait(engine)
        told.append(caught.type.__name__)
        engine.close()  # it ends with what runs

    with Engine(made, slots=2) as engine:
        engine.load_loop_set("a", str(tmp_path / "a"))
        request, _ = asked(made)
        result = engine.submit(replace(request, max_new_tokens=1), on_event=listen).result(TIMEOUT)
        assert result.iterations == 4
    assert set(told) == {"EngineError"}
