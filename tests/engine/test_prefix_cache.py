"""Prefix reuse: names, what is kept and for how long, and that nobody's answer changes by it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slr_core.engine.prefix_cache import BLOCK, PrefixCache, prefix_keys
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams
from tests import tiny
from tests.engine.stepped import Stepped, empty, facts

CAPACITY = 60
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=3 * BLOCK).map(tuple)


def ids(count, start=3):
    return tuple(3 + (start + 7 * i * i + i) % 37 for i in range(count))


# -- names -----------------------------------------------------------------------------------------------


@given(prompts, prompts)
def test_equal_names_are_equal_beginnings(first, second):
    a, b = prefix_keys(first), prefix_keys(second)
    assert len(a) == len(first) // BLOCK + 1
    assert len(set(a)) == len(a)
    for i, key in enumerate(a[:-1]):
        end = (i + 1) * BLOCK
        shared = len(second) >= end and second[:end] == first[:end]
        assert (i < len(b) - 1 and b[i] == key) == shared
        assert (key in b) == shared
    assert (a[-1] in b) == (first == second)


# -- the store -------------------------------------------------------------------------------------------


class Shelf:
    """A prefix cache beside a slot cache whose slots hold random columns."""

    def __init__(self, max_bytes):
        self.cache = KVCache(tiny.base(), 4, CAPACITY)
        self.column = self.cache.store[:, :, 0, :, 0].nbytes
        self.prefixes = PrefixCache(max_bytes if max_bytes is None else int(max_bytes * self.column))
        self.prefixes.max_bytes = 10**9 if max_bytes is None else self.prefixes.max_bytes
        self.columns = {}
        self.states = {}

    def prefill(self, prompt):
        """What the engine does after a prompt has run in slot 0."""
        generator = torch.Generator().manual_seed(0)
        # A column depends on all tokens up to its own.
        for i in range(len(prompt)):
            generator.manual_seed(hash(prompt[: i + 1]))
            self.cache.store[:, :, 0, :, i] = torch.randn(self.cache.store[:, :, 0, :, i].shape, generator=generator)
        self.columns[prompt] = self.cache.take(0, 0, len(prompt))
        self.states[prompt] = torch.randn(32, generator=generator)
        self.prefixes.keep(prefix_keys(prompt), len(prompt), self.cache, 0, self.states[prompt])

    def restore(self, prompt):
        """How many columns of slot 2 are filled, as they must be, and h_0."""
        self.cache.store[:, :, 2] = 0
        filled, state = self.prefixes.restore(prefix_keys(prompt), len(prompt), self.cache, 2)
        assert not self.cache.store[:, :, 2, :, filled:].any()
        for known, columns in self.columns.items():
            if known[:filled] == prompt[:filled]:
                assert torch.equal(self.cache.take(2, 0, filled), columns[..., :filled, :])
        return filled, state

    def weighs(self):
        """Bytes that are really held."""
        return sum(entry.size for entry in self.prefixes._entries.values())


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5])
def test_a_whole_prompt_comes_back_with_its_state(tokens):
    shelf, prompt = Shelf(None), ids(tokens)
    assert shelf.restore(prompt) == (0, None)
    shelf.prefill(prompt)
    filled, state = shelf.restore(prompt)
    assert filled == tokens
    assert torch.equal(state, shelf.states[prompt])


@pytest.mark.parametrize(
    ("kept", "asked", "filled"),
    [
        (20, 40, 16),  # the kept one's tail is not a whole block
        (40, 20, 16),
        (40, 33, 32),
        (40, 32, 16),  # the last token is left to run: there is no state of it
        (16, 17, 16),
        (17, 16, 0),
        (10, 12, 0),
        (12, 10, 0),
    ],
)
def test_a_beginning_is_used_in_whole_blocks_and_leaves_a_token_to_run(kept, asked, filled):
    shelf = Shelf(None)
    shelf.prefill(ids(kept))
    assert shelf.restore(ids(asked)) == (filled, None)


def test_a_prompt_that_differs_early_has_nothing_in_common():
    shelf = Shelf(None)
    shelf.prefill(ids(40))
    assert shelf.restore((1, *ids(40)[1:])) == (0, None)


def test_what_is_kept_does_not_change_with_its_slot():
    shelf, prompt = Shelf(None), ids(20)
    shelf.prefill(prompt)
    state = shelf.states[prompt].clone()
    shelf.cache.wipe(0, 0, CAPACITY)
    shelf.states[prompt].zero_()
    assert torch.equal(shelf.restore(prompt)[1], state)


def test_bytes_are_counted_once_and_come_back():
    shelf = Shelf(None)
    shelf.prefill(ids(40))
    assert shelf.prefixes.bytes == 40 * shelf.column + 32 * 4 == shelf.weighs()
    shelf.prefill(ids(40))
    assert shelf.prefixes.bytes == 40 * shelf.column + 32 * 4
    # Another prompt with two blocks in common.
    shelf.prefill((*ids(32), 1, 1))
    assert shelf.prefixes.bytes == 42 * shelf.column + 2 * 32 * 4 == shelf.weighs()
    shelf.prefixes.clear()
    assert shelf.prefixes.bytes == shelf.weighs() == 0
    assert shelf.restore(ids(40)) == (0, None)


def test_ends_are_forgotten_before_beginnings():
    shelf = Shelf(35)
    shelf.prefill(ids(48))
    assert shelf.restore(ids(48)) == (32, None)
    shelf.prefill(ids(10, start=20))
    assert shelf.restore(ids(10, start=20))[0] == 10
    assert shelf.restore(ids(48)) == (16, None)


def test_who_was_used_last_stays():
    shelf = Shelf(45)
    first, second, third = ids(20), ids(20, start=11), ids(20, start=19)
    shelf.prefill(first)
    shelf.prefill(second)
    assert shelf.restore(first)[0] == 20
    shelf.prefill(third)
    assert shelf.restore(first)[0] == shelf.restore(third)[0] == 20
    assert shelf.restore(second)[0] < 20


@given(st.lists(st.integers(1, 50), max_size=12), st.sampled_from([0, 1, 15.5, 16, 30, 60]))
def test_memory_stays_below_its_bound(lengths, bound):
    shelf = Shelf(bound)
    for length in lengths:
        # Two families of prompts: within each, the shorter begins the longer.
        prompt = ids(length, start=length % 2)
        shelf.prefill(prompt)
        assert shelf.prefixes.bytes == shelf.weighs() <= shelf.prefixes.max_bytes
        shelf.restore(prompt)
    assert all(entry.columns.shape[-2] or entry.state is not None for entry in shelf.prefixes._entries.values())


def test_an_entry_that_can_never_fit_leaves_the_count_right():
    shelf = Shelf(16)
    big = torch.zeros(100 * shelf.column)
    for prompt in (ids(20), ids(20, start=11)):
        shelf.prefixes.keep(prefix_keys(prompt), 20, shelf.cache, 0, big)
        assert shelf.prefixes.bytes == shelf.weighs() <= shelf.prefixes.max_bytes


# -- in the engine ---------------------------------------------------------------------------------------

FIXED = {"max_iterations": 2, "criterion": "fixed"}
SYSTEM = tiny.words(*[i % 37 for i in range(3, 36)])


@pytest.fixture(scope="module", params=["append", "block"])
def made(request):
    return tiny.reasoner(loop=tiny.WORKSPACES[request.param], decode=True)


def asks(made, *endings, **options):
    return [tiny.request(made, f"{SYSTEM} {tiny.words(*ending)}", FIXED, trace=True, **options) for ending in endings]


def answers(engine, requests, **options):
    futures = [engine.submit(request, **options) for request in requests]
    engine.drain()
    return [facts(future.result(0)) for future in futures]


def alone(made, requests):
    return [facts(generate(made, [request])[0]) for request in requests]


def test_prompts_with_a_common_beginning_run_it_once_and_answer_as_without(made):
    requests = asks(made, (1,), (2, 3), (4, 5, 6), max_new_tokens=4)
    expected = alone(made, requests)
    with Stepped(made, slots=3) as engine:
        assert answers(engine, requests) == expected
        counters = engine.counters
        # 33 tokens of the system prompt: two whole blocks and one token.
        assert (counters.prefill_tokens, counters.reused_tokens) == (34 + 3 + 4, 2 * 32)
        assert answers(engine, requests) == expected
        assert (counters.prefill_tokens, counters.reused_tokens) == (41, 64 + 34 + 35 + 36)
        assert empty(engine)


@pytest.mark.parametrize("chunk", [512, 7])
def test_samples_of_one_prompt_prefill_it_once(made, chunk):
    requests = [
        request
        for seed in range(6)
        for request in asks(made, (1, 2), sampling=SamplingParams(temperature=1.0, seed=seed))
    ]
    expected = alone(made, requests)
    with Stepped(made, slots=4, prefill_chunk=chunk) as engine:
        assert answers(engine, requests) == expected
        assert (engine.counters.prefill_tokens, engine.counters.reused_tokens) == (35, 5 * 35)
    assert len(set(expected)) > 1


def test_without_memory_for_prefixes_nothing_is_reused_and_nobody_waits_for_anyone(made):
    requests = asks(made, (1, 2), (1, 2), (1, 2), (1, 2))
    with Stepped(made, slots=4, prefix_gib=0) as engine:
        futures = [engine.submit(request) for request in requests]
        engine.step()
        assert engine.in_flight == 4
        engine.drain()
        assert [facts(future.result(0)) for future in futures] == alone(made, requests)
        assert (engine.counters.prefill_tokens, engine.counters.reused_tokens) == (4 * 35, 0)


def test_a_prompt_that_was_given_up_half_way_is_not_at_hand(made):
    (request,) = asks(made, (1, 2))
    with Stepped(made, slots=2, prefill_chunk=20) as engine:
        first = engine.submit(request)
        engine.step()
        assert first.cancel()
        assert answers(engine, [request]) == alone(made, [request])
        assert (engine.counters.prefill_tokens, engine.counters.reused_tokens) == (20 + 35, 0)


def test_little_memory_changes_no_answer(made):
    requests = asks(made, *[(i, 2 * i) for i in range(8)], max_new_tokens=3)
    expected = alone(made, requests)
    with Stepped(made, slots=2) as engine:
        engine._core.prefixes.max_bytes = 40 * 512
        assert answers(engine, requests) == expected
        assert answers(engine, requests[::-1]) == expected[::-1]
        assert 0 < engine._core.prefixes.bytes <= 40 * 512
        engine._core.prefixes.clear()
        assert engine._core.prefixes.bytes == 0


def test_loop_sets_share_what_the_base_has_run():
    first = tiny.reasoner(loop={"workspace": "append"})
    second = tiny.reasoner(loop=tiny.WORKSPACES["block"], seed=4, plain=tiny.base())
    requests = [asks(made, (1, 2))[0] for made in (first, second)]
    expected = [alone(made, [request])[0] for made, request in zip((first, second), requests, strict=True)]
    with Stepped(first, slots=2) as engine:
        engine.add("second", second)
        assert answers(engine, requests[:1]) == expected[:1]
        assert answers(engine, requests[1:], loop_set="second") == expected[1:]
        assert (engine.counters.prefill_tokens, engine.counters.reused_tokens) == (35, 35)


def test_the_prompt_workspace_runs_no_plain_prompt_and_keeps_none():
    made = tiny.reasoner(loop=tiny.WORKSPACES["prompt"])
    requests = asks(made, (1, 2), (1, 2))
    with Stepped(made, slots=2) as engine:
        assert answers(engine, requests) == alone(made, requests)
        assert (engine.counters.prefill_tokens, engine.counters.reused_tokens) == (0, 0)
        assert engine._core.prefixes.bytes == 0
