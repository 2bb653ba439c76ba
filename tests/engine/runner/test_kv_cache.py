"""The key/value cache: where passes write, what they read, and memory per position."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from slr_core.engine.runner.kv_cache import KVCache, cache_shape, position_bytes
from slr_core.errors import ConfigError
from slr_core.model.base_support import attention_mask
from tests import tiny

SLOTS, CAPACITY = 5, 9


@pytest.fixture
def cache():
    return KVCache(tiny.base(), SLOTS, CAPACITY)


def random_values(rows, queries):
    """Keys and values of a pass: ``[n, heads, q, head_dim]``."""
    return torch.randn(rows, 2, queries, 8), torch.randn(rows, 2, queries, 8)


# -- writing and reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [1, 2], [3], [0, 2], [1, 3, 4]])
def test_pass_writes_positions_and_reads_slots(cache, slots):
    cache.store.normal_()
    before, width = cache.store.clone(), 6
    positions = torch.tensor([[i % 3 + 1, i % 3 + 2] for i in range(len(slots))])
    cache.bind(slots, positions, width)
    for index, layer in enumerate(cache.layers):
        keys, values = random_values(len(slots), 2)
        read_keys, read_values = layer.update(keys, values)
        for part, new, read in ((0, keys, read_keys), (1, values, read_values)):
            expected = before[index, part].clone()
            for row, slot in enumerate(slots):
                expected[slot, :, positions[row]] = new[row]
            assert torch.equal(cache.store[index, part], expected)
            assert torch.equal(read, expected[slots][:, :, :width])


def test_neighbouring_slots_are_read_without_a_copy(cache):
    cache.bind([1, 2, 3], torch.zeros(3, 1, dtype=torch.long), 4)
    keys, values = cache.layers[1].update(*random_values(3, 1))
    assert keys.data_ptr() == cache.store[1, 0, 1].data_ptr()
    assert values.data_ptr() == cache.store[1, 1, 1].data_ptr()


def test_padding_is_written_to_the_scratch_position(cache):
    before = cache.store.clone()
    cache.bind([2, 3], torch.tensor([[0, 1, 2], [0, CAPACITY, CAPACITY]]), 3)
    keys, values = random_values(2, 3)
    keys[1, :, 1:] = torch.nan
    read, _ = cache.layers[0].update(keys, values)
    assert read.isfinite().all()
    assert torch.equal(cache.store[0, 0, 3, :, 0], keys[1, :, 0])
    assert torch.equal(cache.store[0, 0, 3, :, 1:CAPACITY], before[0, 0, 3, :, 1:CAPACITY])
    # The widest possible read ends before it.
    cache.bind([3], torch.tensor([[CAPACITY - 1]]), CAPACITY)
    read, _ = cache.layers[0].update(*random_values(1, 1))
    assert read.shape[2] == CAPACITY
    assert read.isfinite().all()


def test_new_cache_is_all_zeros(cache):
    assert not cache.store.any()
    assert cache.store.shape == (2, 2, SLOTS, 2, CAPACITY + 1, 8)
    cache.bind([0], torch.tensor([[4]]), 5)
    assert cache.get_seq_length() == 5
    assert cache.layers[0].get_mask_sizes(1) == (5, 0)
    assert cache.layers[0].get_max_length() == CAPACITY


def test_reset(cache):
    cache.store.fill_(torch.nan)
    cache.reset()
    assert not cache.store.any()
    cache.write(1, 0, torch.ones(2, 2, 2, 3, 8))
    assert cache.read(1, 0, 4).sum() == 2 * 2 * 2 * 3 * 8


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_scattered_slots_equal_a_dynamic_cache(kind):
    base = tiny.base(kind)
    cache = KVCache(base, SLOTS, CAPACITY)
    ids, slots = torch.randint(3, 40, (3, 4), generator=torch.Generator().manual_seed(1)), [0, 2, 3]
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4)):
            positions = torch.arange(start, end).expand(3, -1)
            cache.bind(slots, positions, end)
            mask = torch.arange(end) <= positions[..., None]
            embeds = base.get_input_embeddings()(ids[:, start:end])
            found = base.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask(base, mask, embeds.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        dynamic = DynamicCache()
        expected = base.base_model(input_ids=ids, past_key_values=dynamic, use_cache=True).last_hidden_state
    torch.testing.assert_close(found, expected[:, 3:], rtol=1e-4, atol=1e-5)
    for index, layer in enumerate(dynamic.layers):
        torch.testing.assert_close(cache.store[index, 0, slots, :, :4], layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.store[index, 1, slots, :, :4], layer.values, rtol=1e-4, atol=1e-5)


# -- moving and clearing ---------------------------------------------------------------------------------


def test_move(cache):
    cache.store.normal_()
    before = cache.store.clone()
    cache.move(4, 1, 3)
    assert torch.equal(cache.store[:, :, 1, :, :3], before[:, :, 4, :, :3])
    expected = before.clone()
    expected[:, :, 1, :, :3] = before[:, :, 4, :, :3]
    assert torch.equal(cache.store, expected)


def test_read_returns_a_copy_that_write_restores(cache):
    cache.store.normal_()
    before = cache.store.clone()
    block = cache.read(1, 2, 5)
    assert block.shape == (2, 2, 2, 3, 8)
    cache.clear(1, 0, CAPACITY)
    cache.write(3, 4, block)
    assert torch.equal(cache.store[:, :, 3, :, 4:7], before[:, :, 1, :, 2:5])
    expected = before.clone()
    expected[:, :, 1, :, :CAPACITY] = 0
    expected[:, :, 3, :, 4:7] = before[:, :, 1, :, 2:5]
    assert torch.equal(cache.store, expected)


def test_clear_removes_non_finite_values(cache):
    cache.store[:, :, 2, :, 3:6] = torch.nan
    cache.clear(2, 3, 6)
    assert not cache.store.any()


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_position_bytes_equal_those_of_a_dynamic_cache(kind, dtype):
    base = tiny.base(kind).to(dtype)
    with torch.no_grad():
        dynamic = base(input_ids=torch.arange(3, 10)[None], use_cache=True).past_key_values
    keys = dynamic.layers[0].keys
    assert cache_shape(base) == (len(dynamic.layers), keys.shape[1], keys.shape[3])
    assert position_bytes(base) * 7 == sum(layer.keys.nbytes + layer.values.nbytes for layer in dynamic.layers)
    cache = KVCache(base, SLOTS, CAPACITY)
    assert cache.store.nbytes == position_bytes(base) * SLOTS * (CAPACITY + 1)
    assert cache.store.dtype == dtype


def test_head_dim_is_read_from_the_config():
    base = tiny.base("qwen3")
    base.config.head_dim = 16
    assert cache_shape(base) == (2, 2, 16)


def test_layers_of_different_shape_are_refused():
    config = SimpleNamespace(num_key_value_heads=[2, 1], num_attention_heads=4, hidden_size=32, num_hidden_layers=2)
    base = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    with pytest.raises(ConfigError, match="different shape"):
        cache_shape(base)
