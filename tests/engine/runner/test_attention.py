"""Packed passes: single positions and whole prompts in one batch."""

from types import SimpleNamespace

import pytest
import torch

from slr_core.engine.runner import packing
from slr_core.engine.runner.attention import NAME, enable_packing
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.packing import GatheredVectors, pack, split_into_passes
from slr_core.engine.scheduler import Work
from slr_core.generation.reference import generate
from tests import tiny
from tests.engine.harness import SteppedCore, facts, is_empty


def fixed(iterations, new=4):
    return {"loop": {"max_iterations": iterations, "criterion": "fixed"}, "max_new_tokens": new}


def watch(stepped):
    """The shapes and packed batches of passes, recorded as they run."""
    seen = []

    def record(_module, _args, options):
        seen.append((tuple(options["inputs_embeds"].shape[:2]), options.get("packed")))

    stepped.model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
def test_step_is_one_pass(kind, workspace):
    made = tiny.reasoner(kind, tiny.WORKSPACES[workspace])
    requests = [tiny.request(made, prompt, **fixed(i % 4)) for i, prompt in enumerate(tiny.PROMPTS)]
    stepped = SteppedCore(made, slots=3, prefix_gib=0)
    seen = watch(stepped)
    futures = []
    for request in requests:  # one per step, so that prompts, iterations and tokens share passes
        futures.append(stepped.submit(request))
        stepped.step()
    stepped.drain()
    assert len(seen) == stepped.counters.steps
    assert any(packed for _, packed in seen)
    assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]
    assert is_empty(stepped.core)


def test_packed_pass_has_no_padding():
    made = tiny.reasoner()
    stepped = SteppedCore(made, slots=4, prefix_gib=0)
    seen = watch(stepped)
    stepped.submit(tiny.request(made, tiny.words(1), **fixed(5)))
    stepped.step()
    for length in (3, 5, 9):
        stepped.submit(tiny.request(made, tiny.words(*range(length)), **fixed(1)))
    stepped.step()
    (_, unpacked), (shape, packed) = seen
    assert unpacked is None
    assert shape == (1 + 3 + 5 + 9, 1)
    assert [segment.mask.shape[2] for segment in packed.segments] == [1, 3, 5, 9]
    stepped.drain()
    assert made.base.config._attn_implementation == "sdpa"  # the stepped's own copy alone is changed


def test_single_positions_around_a_prompt():
    made = tiny.reasoner()
    lengths = ((1, fixed(5)), (1, fixed(0, 1)), (1, fixed(5)), (9, fixed(2)))
    requests = [tiny.request(made, tiny.words(*range(i, i + n)), **options) for i, (n, options) in enumerate(lengths)]
    stepped = SteppedCore(made, slots=4, prefill_chunk=6, prefix_gib=0)
    futures = [stepped.submit(request) for request in requests]
    stepped.step()  # the second ends, and the long prompt moves into its slot
    seen = watch(stepped)
    stepped.step()
    assert [s.active_slots.tolist() for s in seen[0][1].segments if s.active_slots is not None] == [[0, 2]]
    stepped.drain()
    assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]


def test_rows_far_apart_in_their_slots_are_gathered():
    """In the workspace ``token``, rows of different iterations read different key/value caches."""
    made = tiny.reasoner(loop={"workspace": "token", "max_iterations": 4})
    requests = [tiny.request(made, prompt, **fixed(1 + i % 4, 6)) for i, prompt in enumerate(tiny.PROMPTS[:4])]
    stepped = SteppedCore(made, slots=4, capacity=128, prefix_gib=0)
    seen = watch(stepped)
    futures = [stepped.submit(request) for request in requests]
    stepped.drain()
    gathered = [
        segment
        for _, packed in seen
        for segment in (packed.segments if packed else [])
        if isinstance(segment.source, GatheredVectors)
    ]
    assert gathered
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    assert max(segment.mask.shape[-1] for segment in gathered) <= longest
    assert [facts(f.result()) for f in futures] == [facts(generate(made, [r])[0]) for r in requests]


def test_gathered_rows_hold_nothing_of_others():
    """Masked values would still spoil attention if they were not finite."""
    made = tiny.reasoner(loop={"workspace": "token", "max_iterations": 4})
    stepped = SteppedCore(made, slots=3, capacity=64, prefix_gib=0)
    for prompt, iterations in (("w1 w2 w3", 1), ("w4", 4)):
        stepped.submit(tiny.request(made, prompt, **fixed(iterations, 8)))
    sequences, cache = stepped.core.scheduler.running, stepped.core.cache
    while not (len(sequences) == 2 and sequences[1].cache_start > 2 * sequences[0].filled > 0):
        stepped.step()
    cache.store.fill_(torch.nan)
    ends = [sequence.cache_start + sequence.filled for sequence in sequences]
    for number, (sequence, end) in enumerate(zip(sequences, ends, strict=True)):
        cache.store[:, :, sequence.slot, :, sequence.cache_start : end + 1] = number
    segment = pack([Work(s, 1) for s in sequences], torch.tensor(ends), cache).segments[0]
    for read in segment.source.read(*cache.store[0]):
        assert [x.unique().tolist() for x in read] == [[0.0], [1.0]]
    assert segment.mask.sum(-1).flatten().tolist() == [s.filled + 1 for s in sequences]


@pytest.mark.parametrize(("filled", "queries", "joins"), [(0, 8, True), (0, 9, False), (18, 3, True), (19, 3, False)])
def test_short_rows_are_gathered_unless_they_lengthen_every_copy(filled, queries, joins):
    """The end of a long prompt whose beginning comes from the prefix cache has few positions, but reads many."""
    cache = KVCache(tiny.base(), slots=3, capacity=120)
    rows = [
        Work(SimpleNamespace(slot=0, cache_start=0, filled=4), 1),
        Work(SimpleNamespace(slot=1, cache_start=80, filled=20), 1),
        Work(SimpleNamespace(slot=2, cache_start=40, filled=filled), queries),
    ]
    last = [s.cache_start + s.filled + i for s, count in rows for i in range(count)]
    first, *others = pack(rows, torch.tensor(last), cache).segments
    assert isinstance(first.source, GatheredVectors)
    assert first.mask.shape[-1] == 21
    assert first.rows == slice(0, 2 + queries * joins)
    assert [segment.rows for segment in others] == ([] if joins else [slice(2, 2 + queries)])


def test_large_step_is_split_into_passes(monkeypatch):
    monkeypatch.setattr(packing, "PACKED_POSITIONS", 8)
    made = tiny.reasoner()
    stepped = SteppedCore(made, slots=2, prefix_gib=0)
    seen = watch(stepped)
    stepped.submit(tiny.request(made, tiny.words(1), **fixed(5)))
    stepped.submit(tiny.request(made, tiny.words(*range(8)), **fixed(1)))
    stepped.step()
    assert [shape for shape, _ in seen] == [(1, 1), (1, 8)]
    stepped.drain()
    assert split_into_passes([], packing=True) == split_into_passes([], packing=False) == []


def test_model_without_sdpa_keeps_its_attention():
    base = tiny.base()
    base.set_attn_implementation("eager")
    assert not enable_packing(base)
    assert base.config._attn_implementation == "eager"


def test_model_that_drops_options_is_not_packed():
    base = tiny.base()
    assert enable_packing(base)
    assert base.config._attn_implementation == NAME
    other = tiny.base()
    forward = other.base_model.forward
    other.base_model.forward = lambda *args, packed=None, **options: forward(*args, **options)
    assert not enable_packing(other)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_unpacked_attention_is_that_of_transformers(kind):
    base, same = tiny.base(kind), tiny.base(kind)
    assert enable_packing(same)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, same(input_ids=ids).logits)
