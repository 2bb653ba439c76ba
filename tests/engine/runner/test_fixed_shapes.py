"""Loop and decode passes in fixed shapes: the same answers, few shapes, current adapters; CUDA graphs on a GPU."""

import pytest
import torch

from slr_core.engine import Engine
from slr_core.engine.runner.fixed_shapes import FixedShapeRunner
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.harness import SteppedCore, facts, is_empty

LOOPS = ({"max_iterations": 0}, {"max_iterations": 2, "criterion": "fixed"}, {"threshold": 0.5})


def shapes(stepped):
    return set(stepped.core.runner.fixed_shapes._graphs)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_answers_are_those_of_the_reference(kind, workspace):
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace])
    requests = [tiny.request(made, prompt, LOOPS[i % 3]) for i, prompt in enumerate(tiny.PROMPTS * 2)]
    stepped = SteppedCore(made, slots=5, prefill_chunk=3, static_shapes=True)
    futures = [stepped.submit(request) for request in requests]
    stepped.drain()
    assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]
    assert is_empty(stepped.core)


def test_shapes_are_powers_of_two_within_the_cache():
    made = tiny.reasoner()
    stepped = SteppedCore(made, slots=6, capacity=64, static_shapes=True)
    for count in (1, 2, 3, 5, 6):
        for prompt in range(count):
            stepped.submit(tiny.request(made, tiny.words(prompt, 4, 5), {"max_iterations": 3}))
        stepped.drain()
    assert {rows for rows, _, _ in shapes(stepped)} == {1, 2, 4, 6}
    assert {width for _, width, _ in shapes(stepped)} == {64}


def test_read_width_is_a_power_of_two(monkeypatch):
    monkeypatch.setattr("slr_core.engine.runner.fixed_shapes.MIN_WIDTH", 8)
    made = tiny.reasoner()
    request = tiny.request(made, tiny.words(*range(6)), {"max_iterations": 4, "criterion": "fixed"}, max_new_tokens=8)
    stepped = SteppedCore(made, slots=1, capacity=40, static_shapes=True)
    future = stepped.submit(request)
    stepped.drain()
    assert facts(future.result()) == facts(generate(made, [request])[0])
    assert {width for _, width, _ in shapes(stepped)} >= {8, 16}


def test_rows_without_adapters_have_their_own_shapes():
    made = tiny.reasoner()
    stepped = SteppedCore(made, slots=1, static_shapes=True)
    stepped.submit(tiny.request(made, "w1 w2", {"max_iterations": 0}))
    stepped.drain()
    assert {has_adapters for _, _, has_adapters in shapes(stepped)} == {False}
    stepped.submit(tiny.request(made, "w1 w2", {"max_iterations": 2}))
    stepped.drain()
    assert {has_adapters for _, _, has_adapters in shapes(stepped)} == {False, True}


def test_changed_adapters_are_captured_again():
    made, other = tiny.reasoner(), tiny.reasoner(seed=5, plain=tiny.base())
    request = tiny.request(other, "w1 w2 w3", {"max_iterations": 3})
    stepped = SteppedCore(made, static_shapes=True)
    stepped.submit(tiny.request(made, "w1 w2", {"max_iterations": 3}))
    stepped.drain()
    before = dict(stepped.core.runner.fixed_shapes._graphs)
    stepped.add("other", other)
    future = stepped.submit(request, loop_set="other")
    stepped.drain()
    assert facts(future.result()) == facts(generate(other, [request])[0])
    assert all(now is not before.get(shape) for shape, now in stepped.core.runner.fixed_shapes._graphs.items())


def test_padding_rows_change_no_slot():
    made = tiny.reasoner()
    lora_batch = LoraBatch(made.base)
    lora_batch.set_adapters([(made.base, name) for name in made.config.loop.adapters])
    cache = KVCache(lora_batch.model, 4, 16)
    torch.manual_seed(0)
    cache.store.normal_()
    before = cache.store.clone()
    x = torch.randn(2, 1, 32)
    with torch.inference_mode():
        hidden = FixedShapeRunner(lora_batch, cache).run([1, 2], [3, 7], [0, 0], [0, None], x)
    written = torch.zeros(4, 17, dtype=torch.bool)
    written[1, 3] = written[2, 7] = True
    written[:, 16] = True  # padding is written there
    changed = (cache.store != before).any(-1).any(0).any(0).any(1)
    assert changed[1, 3]
    assert changed[2, 7]
    assert not changed[~written].any()
    assert hidden.shape == (2, 1, 32)


def test_result_survives_the_next_pass():
    made = tiny.reasoner()
    lora_batch = LoraBatch(made.base)
    lora_batch.set_adapters([(made.base, name) for name in made.config.loop.adapters])
    runner = FixedShapeRunner(lora_batch, KVCache(lora_batch.model, 2, 16))
    with torch.inference_mode():
        first = runner.run([0], [0], [0], [0], torch.ones(1, 1, 32))
        kept = first.clone()
        runner.run([0], [1], [0], [1], -torch.ones(1, 1, 32))
    torch.testing.assert_close(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_replays_graphs(dtype):
    made = tiny.reasoner().to("cuda", dtype)
    requests = [tiny.request(made, prompt, LOOPS[1]) for prompt in tiny.PROMPTS]
    answers = []
    for static in (True, False):
        with Engine(made, slots=4, static_shapes=static) as engine:
            answers.append([f.result().token_ids for f in [engine.submit(request) for request in requests]])
            if static:
                assert all(
                    type(graph).__name__ == "CapturedPass"
                    for graph in engine._core.runner.fixed_shapes._graphs.values()
                )
    if dtype == torch.float32:
        assert answers[0] == answers[1] == [generate(made, [request])[0].token_ids for request in requests]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fixed_shapes_are_the_default_on_a_gpu():
    with Engine(tiny.reasoner().to("cuda"), slots=2) as engine:
        assert engine._core.runner.fixed_shapes is not None
    with Engine(tiny.reasoner(), slots=2) as engine:
        assert engine._core.runner.fixed_shapes is None
