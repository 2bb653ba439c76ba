"""Adding and removing loop adapter sets: a change happens completely or not at all."""

from dataclasses import replace

import pytest
import torch

from slr_core.engine import Engine
from slr_core.engine import engine as engine_module
from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.runner import lora_batch
from slr_core.errors import CheckpointError, ConfigError
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.harness import TIMEOUT, SteppedCore, facts

PROMPT = tiny.PROMPTS[3]
LOOP = {"loop": {"max_iterations": 4, "criterion": "fixed"}, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def made():
    return tiny.reasoner()


@pytest.fixture(scope="module")
def others(made):
    """Loops on the same base, by name, whose adapters differ."""
    return {name: tiny.reasoner(seed=seed, plain=tiny.base()) for seed, name in enumerate("abc", 5)}


def request_and_answer(reasoner):
    request = tiny.request(reasoner, PROMPT, **LOOP)
    return request, facts(generate(reasoner, [request])[0])


def fail_after(monkeypatch, layers):
    """Make memory run out after so many layers' adapters; returns a function that ends this."""
    real = lora_batch._stack_weights
    left = [layers]

    def stack(layers_of_adapters):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no room for adapters")
        return real(layers_of_adapters)

    monkeypatch.setattr(lora_batch, "_stack_weights", stack)
    return lambda: monkeypatch.setattr(lora_batch, "_stack_weights", real)


def test_add_without_memory_changes_nothing(made, others, monkeypatch):
    stepped = SteppedCore(made, slots=4)
    stepped.add("a", others["a"])
    (ours, our_answer), (theirs, their_answer) = request_and_answer(made), request_and_answer(others["a"])
    running = [stepped.submit(ours), stepped.submit(theirs, loop_set="a")]
    stepped.step(2)
    restore = fail_after(monkeypatch, 5)
    with pytest.raises(torch.OutOfMemoryError):
        stepped.add("b", others["b"])
    assert list(stepped.adapter_sets.by_name) == ["default", "a"]
    restore()
    stepped.drain()
    assert [facts(future.result(0)) for future in running] == [our_answer, their_answer]
    stepped.add("b", others["b"])  # the name is still free
    request, answer = request_and_answer(others["b"])
    future = stepped.submit(request, loop_set="b")
    stepped.drain()
    assert facts(future.result(0)) == answer


def test_remove_without_memory_changes_no_answer(made, others, monkeypatch, caplog):
    stepped = SteppedCore(made, slots=4)
    for name in "ab":
        stepped.add(name, others[name])
    request, answer = request_and_answer(others["b"])
    restore = fail_after(monkeypatch, 5)
    stepped.remove("a")
    assert "stay loaded until the next change" in caplog.text
    future = stepped.submit(request, loop_set="b")
    stepped.drain()
    assert facts(future.result(0)) == answer
    restore()
    stepped.add("c", others["c"])
    assert {loops.name for loops in stepped.adapter_sets.held} == {"default", "b", "c"}
    for name in "bc":
        request, answer = request_and_answer(others[name])
        future = stepped.submit(request, loop_set=name)
        stepped.drain()
        assert facts(future.result(0)) == answer


def test_removed_set_is_freed_after_its_last_request(made, others, monkeypatch):
    stepped = SteppedCore(made, slots=4)
    stepped.add("a", others["a"])
    request, answer = request_and_answer(others["a"])
    future = stepped.submit(request, loop_set="a")
    stepped.step()
    stepped.remove("a")
    assert {loops.name for loops in stepped.adapter_sets.held} == {"default", "a"}
    restore = fail_after(monkeypatch, 5)
    stepped.drain()  # no memory to rebuild the batch: no caller waits for that
    assert facts(future.result(0)) == answer
    restore()


def test_name_is_taken_once(made, others):
    stepped = SteppedCore(made, slots=2)
    first = stepped.add("a", others["a"])
    with pytest.raises(ConfigError, match="there is a loop adapter set 'a' already"):
        stepped.adapter_sets.add(LoopAdapterSet("a", others["b"]))
    assert stepped.adapter_sets.find("a") is first


def test_load_releases_workers_even_if_it_fails(made, monkeypatch, tmp_path):
    released = []
    with Engine(made, slots=2) as engine:
        monkeypatch.setattr(engine_module, "release_workers", lambda: released.append(1))
        with pytest.raises(CheckpointError):
            engine.load_loop_set("a", str(tmp_path / "nowhere"))
        assert released == [1]
        tiny.reasoner(plain=tiny.base()).save_pretrained(str(tmp_path / "a"))
        engine.load_loop_set("a", str(tmp_path / "a"))
        assert released == [1, 1]


def test_non_finite_adapters_are_refused():
    broken = tiny.reasoner()
    with torch.no_grad():
        next(p for name, p in broken.base.named_parameters() if "lora_B" in name)[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="not finite"):
        Engine(broken)


@pytest.mark.parametrize(
    "wait",
    [
        lambda engine: engine.remove_loop_set("a"),
        lambda engine: engine.generate("w1"),
        lambda engine: engine._thread.call(lambda: None),
    ],
)
def test_callback_must_not_wait_for_the_engine(made, others, tmp_path, wait):
    others["a"].save_pretrained(str(tmp_path / "a"))
    errors = []

    def wait_in_callback(_):
        with pytest.raises(Exception, match="must not wait for the engine") as caught:
            wait(engine)
        errors.append(caught.type.__name__)
        engine.close()  # ends after the running request

    with Engine(made, slots=2) as engine:
        engine.load_loop_set("a", str(tmp_path / "a"))
        request, _ = request_and_answer(made)
        result = engine.submit(replace(request, max_new_tokens=1), on_event=wait_in_callback).result(TIMEOUT)
        assert result.iterations == 4
    assert set(errors) == {"EngineError"}
