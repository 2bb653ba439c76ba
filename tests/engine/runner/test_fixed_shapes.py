"""Loop and decode passes in fixed shapes: the same answers, few shapes, no stale adapters; graphs where a GPU is."""

import pytest
import torch

from slr_core.engine import Engine
from slr_core.engine.runner.fixed_shapes import FixedShapeRunner
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.stepped import Stepped, empty, facts

LOOPS = ({"max_iterations": 0}, {"max_iterations": 2, "criterion": "fixed"}, {"threshold": 0.5})


def shapes(engine):
    return set(engine._core.passes.static._graphs)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_answers_are_those_of_the_reference(kind, workspace):
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace])
    requests = [tiny.request(made, prompt, LOOPS[i % 3]) for i, prompt in enumerate(tiny.PROMPTS * 2)]
    with Stepped(made, slots=5, prefill_chunk=3, static_shapes=True) as engine:
        futures = [engine.submit(request) for request in requests]
        engine.drain()
        assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]
        assert empty(engine)


def test_shapes_are_powers_of_two_within_the_cache():
    made = tiny.reasoner()
    with Stepped(made, slots=6, capacity=64, static_shapes=True) as engine:
        for count in (1, 2, 3, 5, 6):
            for prompt in range(count):
                engine.submit(tiny.request(made, tiny.words(prompt, 4, 5), {"max_iterations": 3}))
            engine.drain()
        assert {rows for rows, _, _ in shapes(engine)} == {1, 2, 4, 6}
        assert {width for _, width, _ in shapes(engine)} == {64}


def test_columns_are_read_to_the_next_power_of_two(monkeypatch):
    monkeypatch.setattr("slr_core.engine.runner.fixed_shapes._FEWEST_COLUMNS", 8)
    made = tiny.reasoner()
    request = tiny.request(made, tiny.words(*range(6)), {"max_iterations": 4, "criterion": "fixed"}, max_new_tokens=8)
    with Stepped(made, slots=1, capacity=40, static_shapes=True) as engine:
        future = engine.submit(request)
        engine.drain()
        assert facts(future.result()) == facts(generate(made, [request])[0])
        assert {width for _, width, _ in shapes(engine)} >= {8, 16}


def test_rows_without_adapters_share_a_shape_without_them():
    made = tiny.reasoner()
    with Stepped(made, slots=1, static_shapes=True) as engine:
        engine.submit(tiny.request(made, "w1 w2", {"max_iterations": 0}))
        engine.drain()
        assert {adapted for _, _, adapted in shapes(engine)} == {False}
        engine.submit(tiny.request(made, "w1 w2", {"max_iterations": 2}))
        engine.drain()
        assert {adapted for _, _, adapted in shapes(engine)} == {False, True}


def test_other_adapters_are_captured_anew():
    made, other = tiny.reasoner(), tiny.reasoner(seed=5, plain=tiny.base())
    request = tiny.request(other, "w1 w2 w3", {"max_iterations": 3})
    with Stepped(made, static_shapes=True) as engine:
        engine.submit(tiny.request(made, "w1 w2", {"max_iterations": 3}))
        engine.drain()
        before = dict(engine._core.passes.static._graphs)
        engine.add("other", other)
        future = engine.submit(request, loop_set="other")
        engine.drain()
        assert facts(future.result()) == facts(generate(other, [request])[0])
        assert all(now is not before.get(shape) for shape, now in engine._core.passes.static._graphs.items())


def test_idle_rows_leave_the_slots_alone():
    made = tiny.reasoner()
    bank = LoraBatch(made.base)
    bank.fill([(made.base, name) for name in made.config.loop.adapters])
    cache = KVCache(bank.model, 4, 16)
    torch.manual_seed(0)
    cache.store.normal_()
    before = cache.store.clone()
    x = torch.randn(2, 1, 32)
    with torch.inference_mode():
        hidden = FixedShapeRunner(bank, cache).run([1, 2], [3, 7], [0, None], x)
    written = torch.zeros(4, 17, dtype=torch.bool)
    written[1, 3] = written[2, 7] = True
    written[:, 16] = True  # where padding goes
    changed = (cache.store != before).any(-1).any(0).any(0).any(1)
    assert changed[1, 3]
    assert changed[2, 7]
    assert not changed[~written].any()
    assert hidden.shape == (2, 1, 32)


def test_a_result_outlives_the_next_pass():
    made = tiny.reasoner()
    bank = LoraBatch(made.base)
    bank.fill([(made.base, name) for name in made.config.loop.adapters])
    passes = FixedShapeRunner(bank, KVCache(bank.model, 2, 16))
    with torch.inference_mode():
        first = passes.run([0], [0], [0], torch.ones(1, 1, 32))
        kept = first.clone()
        passes.run([0], [1], [1], -torch.ones(1, 1, 32))
    torch.testing.assert_close(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_graphs_and_answers_alike(dtype):
    made = tiny.reasoner().to("cuda", dtype)
    requests = [tiny.request(made, prompt, LOOPS[1]) for prompt in tiny.PROMPTS]
    answers = []
    for static in (True, False):
        with Engine(made, slots=4, static_shapes=static) as engine:
            answers.append([f.result().token_ids for f in [engine.submit(request) for request in requests]])
            if static:
                assert all(type(graph).__name__ == "_Graph" for graph in engine._core.passes.static._graphs.values())
    if dtype == torch.float32:
        assert answers[0] == answers[1] == [generate(made, [request])[0].token_ids for request in requests]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_where_fixed_shapes_are_the_default():
    with Engine(tiny.reasoner().to("cuda"), slots=2) as engine:
        assert engine._core.passes.static is not None
    with Engine(tiny.reasoner(), slots=2) as engine:
        assert engine._core.passes.static is None
