"""The prefix cache: keys, entries, eviction, and answers that are the same with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slr_core.engine.prefix_cache import BLOCK, PrefixCache, prefix_keys
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams
from tests import tiny
from tests.engine.harness import SteppedCore, facts, is_empty

CAPACITY = 60
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=3 * BLOCK).map(tuple)


def ids(count, start=3):
    return tuple(3 + (start + 7 * i * i + i) % 37 for i in range(count))


# -- keys ------------------------------------------------------------------------------------------------


@given(prompts, prompts)
def test_equal_keys_are_equal_prefixes(first, second):
    a, b = prefix_keys(first), prefix_keys(second)
    assert len(a) == len(first) // BLOCK + 1
    assert len(set(a)) == len(a)
    for i, key in enumerate(a[:-1]):
        end = (i + 1) * BLOCK
        shared = len(second) >= end and second[:end] == first[:end]
        assert (i < len(b) - 1 and b[i] == key) == shared
        assert (key in b) == shared
    assert (a[-1] in b) == (first == second)


# -- entries ---------------------------------------------------------------------------------------------


class Fixture:
    """A prefix cache and a key/value cache whose slots hold random values."""

    def __init__(self, max_bytes):
        self.cache = KVCache(tiny.base(), 4, CAPACITY)
        self.position_bytes = self.cache.store[:, :, 0, :, 0].nbytes
        self.prefixes = PrefixCache(max_bytes if max_bytes is None else int(max_bytes * self.position_bytes))
        self.prefixes.max_bytes = 10**9 if max_bytes is None else self.prefixes.max_bytes
        self.keys_values = {}
        self.states = {}

    def prefill(self, prompt):
        """What the core does after a prompt was prefilled in slot 0."""
        generator = torch.Generator().manual_seed(0)
        # A position's values depend on all tokens up to its own.
        for i in range(len(prompt)):
            generator.manual_seed(hash(prompt[: i + 1]))
            self.cache.store[:, :, 0, :, i] = torch.randn(self.cache.store[:, :, 0, :, i].shape, generator=generator)
        self.keys_values[prompt] = self.cache.read(0, 0, len(prompt))
        self.states[prompt] = torch.randn(32, generator=generator)
        self.prefixes.save(prefix_keys(prompt), len(prompt), self.cache, 0, self.states[prompt])

    def restore(self, prompt):
        """How many positions of slot 2 are filled, after checking them, and h_0."""
        self.cache.store[:, :, 2] = 0
        filled, state = self.prefixes.restore(prefix_keys(prompt), len(prompt), self.cache, 2)
        assert not self.cache.store[:, :, 2, :, filled:].any()
        for known, keys_values in self.keys_values.items():
            if known[:filled] == prompt[:filled]:
                assert torch.equal(self.cache.read(2, 0, filled), keys_values[..., :filled, :])
        return filled, state

    def nbytes(self):
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.prefixes._entries.values())


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5])
def test_whole_prompt_is_restored_with_its_state(tokens):
    fixture, prompt = Fixture(None), ids(tokens)
    assert fixture.restore(prompt) == (0, None)
    fixture.prefill(prompt)
    filled, state = fixture.restore(prompt)
    assert filled == tokens
    assert torch.equal(state, fixture.states[prompt])


@pytest.mark.parametrize(
    ("saved", "restored", "filled"),
    [
        (20, 40, 16),  # the saved prompt's last block is not full
        (40, 20, 16),
        (40, 33, 32),
        (40, 32, 16),  # the last token has to run, as its state is not cached
        (16, 17, 16),
        (17, 16, 0),
        (10, 12, 0),
        (12, 10, 0),
    ],
)
def test_prefix_is_restored_in_full_blocks(saved, restored, filled):
    fixture = Fixture(None)
    fixture.prefill(ids(saved))
    assert fixture.restore(ids(restored)) == (filled, None)


def test_prompt_that_differs_early_restores_nothing():
    fixture = Fixture(None)
    fixture.prefill(ids(40))
    assert fixture.restore((1, *ids(40)[1:])) == (0, None)


def test_entries_are_copies():
    fixture, prompt = Fixture(None), ids(20)
    fixture.prefill(prompt)
    state = fixture.states[prompt].clone()
    fixture.cache.clear(0, 0, CAPACITY)
    fixture.states[prompt].zero_()
    assert torch.equal(fixture.restore(prompt)[1], state)


def test_bytes_are_counted_once():
    fixture = Fixture(None)
    fixture.prefill(ids(40))
    assert fixture.prefixes.bytes == 40 * fixture.position_bytes + 32 * 4 == fixture.nbytes()
    fixture.prefill(ids(40))
    assert fixture.prefixes.bytes == 40 * fixture.position_bytes + 32 * 4
    # Another prompt with two blocks in common.
    fixture.prefill((*ids(32), 1, 1))
    assert fixture.prefixes.bytes == 42 * fixture.position_bytes + 2 * 32 * 4 == fixture.nbytes()


def test_later_blocks_are_evicted_first():
    fixture = Fixture(35)
    fixture.prefill(ids(48))
    assert fixture.restore(ids(48)) == (32, None)
    fixture.prefill(ids(10, start=20))
    assert fixture.restore(ids(10, start=20))[0] == 10
    assert fixture.restore(ids(48)) == (16, None)


def test_last_used_prompt_stays():
    fixture = Fixture(45)
    first, second, third = ids(20), ids(20, start=11), ids(20, start=19)
    fixture.prefill(first)
    fixture.prefill(second)
    assert fixture.restore(first)[0] == 20
    fixture.prefill(third)
    assert fixture.restore(first)[0] == fixture.restore(third)[0] == 20
    assert fixture.restore(second)[0] < 20


@given(st.lists(st.integers(1, 50), max_size=12), st.sampled_from([0, 1, 15.5, 16, 30, 60]))
def test_memory_stays_within_its_limit(lengths, bound):
    fixture = Fixture(bound)
    for length in lengths:
        # Two families of prompts; within each, a shorter one is a prefix of a longer one.
        prompt = ids(length, start=length % 2)
        fixture.prefill(prompt)
        assert fixture.prefixes.bytes == fixture.nbytes() <= fixture.prefixes.max_bytes
        fixture.restore(prompt)
    assert all(entry.keys_values.shape[-2] or entry.state is not None for entry in fixture.prefixes._entries.values())


def test_entry_above_the_limit_is_not_stored():
    fixture = Fixture(16)
    big = torch.zeros(100 * fixture.position_bytes)
    for prompt in (ids(20), ids(20, start=11)):
        fixture.prefixes.save(prefix_keys(prompt), 20, fixture.cache, 0, big)
        assert fixture.prefixes.bytes == fixture.nbytes() <= fixture.prefixes.max_bytes


# -- in the core -----------------------------------------------------------------------------------------

FIXED = {"max_iterations": 2, "criterion": "fixed"}
SYSTEM = tiny.words(*[i % 37 for i in range(3, 36)])


@pytest.fixture(scope="module", params=["append", "block"])
def made(request):
    return tiny.reasoner(loop=tiny.WORKSPACES[request.param], decode=True)


def make_requests(made, *endings, **options):
    return [tiny.request(made, f"{SYSTEM} {tiny.words(*ending)}", FIXED, trace=True, **options) for ending in endings]


def answers(stepped, requests, **options):
    futures = [stepped.submit(request, **options) for request in requests]
    stepped.drain()
    return [facts(future.result(0)) for future in futures]


def alone(made, requests):
    return [facts(generate(made, [request])[0]) for request in requests]


def test_shared_prefix_runs_once(made):
    requests = make_requests(made, (1,), (2, 3), (4, 5, 6), max_new_tokens=4)
    expected = alone(made, requests)
    stepped = SteppedCore(made, slots=3)
    assert answers(stepped, requests) == expected
    counters = stepped.counters
    # 33 tokens of the system prompt: two full blocks and one token.
    assert (counters.prefill_tokens, counters.reused_tokens) == (34 + 3 + 4, 2 * 32)
    assert answers(stepped, requests) == expected
    assert (counters.prefill_tokens, counters.reused_tokens) == (41, 64 + 34 + 35 + 36)
    assert is_empty(stepped.core)


@pytest.mark.parametrize("chunk", [512, 7])
def test_samples_of_a_prompt_prefill_it_once(made, chunk):
    requests = [
        request
        for seed in range(6)
        for request in make_requests(made, (1, 2), sampling=SamplingParams(temperature=1.0, seed=seed))
    ]
    expected = alone(made, requests)
    stepped = SteppedCore(made, slots=4, prefill_chunk=chunk)
    assert answers(stepped, requests) == expected
    assert (stepped.counters.prefill_tokens, stepped.counters.reused_tokens) == (35, 5 * 35)
    assert len(set(expected)) > 1


def test_without_memory_nothing_is_reused(made):
    requests = make_requests(made, (1, 2), (1, 2), (1, 2), (1, 2))
    stepped = SteppedCore(made, slots=4, prefix_gib=0)
    futures = [stepped.submit(request) for request in requests]
    stepped.step()
    assert stepped.in_flight == 4
    stepped.drain()
    assert [facts(future.result(0)) for future in futures] == alone(made, requests)
    assert (stepped.counters.prefill_tokens, stepped.counters.reused_tokens) == (4 * 35, 0)


def test_cancelled_prefill_is_not_cached(made):
    (request,) = make_requests(made, (1, 2))
    stepped = SteppedCore(made, slots=2, prefill_chunk=20)
    first = stepped.submit(request)
    stepped.step()
    assert first.cancel()
    assert answers(stepped, [request]) == alone(made, [request])
    assert (stepped.counters.prefill_tokens, stepped.counters.reused_tokens) == (20 + 35, 0)


def test_little_memory_changes_no_answer(made):
    requests = make_requests(made, *[(i, 2 * i) for i in range(8)], max_new_tokens=3)
    expected = alone(made, requests)
    stepped = SteppedCore(made, slots=2)
    stepped.core.prefixes.max_bytes = 40 * 512
    assert answers(stepped, requests) == expected
    assert answers(stepped, requests[::-1]) == expected[::-1]
    assert 0 < stepped.core.prefixes.bytes <= 40 * 512


def test_loop_adapter_sets_share_prefixes():
    first = tiny.reasoner(loop={"workspace": "append"})
    second = tiny.reasoner(loop=tiny.WORKSPACES["block"], seed=4, plain=tiny.base())
    requests = [make_requests(made, (1, 2))[0] for made in (first, second)]
    expected = [alone(made, [request])[0] for made, request in zip((first, second), requests, strict=True)]
    stepped = SteppedCore(first, slots=2)
    stepped.add("second", second)
    assert answers(stepped, requests[:1]) == expected[:1]
    assert answers(stepped, requests[1:], loop_set="second") == expected[1:]
    assert (stepped.counters.prefill_tokens, stepped.counters.reused_tokens) == (35, 35)


def test_workspace_prompt_caches_no_prefix():
    made = tiny.reasoner(loop=tiny.WORKSPACES["prompt"])
    requests = make_requests(made, (1, 2), (1, 2))
    stepped = SteppedCore(made, slots=2)
    assert answers(stepped, requests) == alone(made, requests)
    assert (stepped.counters.prefill_tokens, stepped.counters.reused_tokens) == (0, 0)
    assert stepped.core.prefixes.bytes == 0
