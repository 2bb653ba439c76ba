"""The slot cache: what is written where, what can be read, and what a column costs."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from slr_core.engine.runner.kv_cache import KVCache, position_bytes, shape
from slr_core.errors import ConfigError
from slr_core.model.base_support import attention_mask
from tests import tiny

SLOTS, CAPACITY = 5, 9


@pytest.fixture
def cache():
    return KVCache(tiny.base(), SLOTS, CAPACITY)


def fresh(rows, queries):
    """Keys and values as attention makes them: ``[n, heads, q, head_dim]``."""
    return torch.randn(rows, 2, queries, 8), torch.randn(rows, 2, queries, 8)


# -- writing and reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [1, 2], [3], [0, 2], [1, 3, 4]])
def test_a_pass_writes_its_columns_and_reads_its_slots(cache, slots):
    cache.store.normal_()
    before, width = cache.store.clone(), 6
    columns = torch.tensor([[i % 3 + 1, i % 3 + 2] for i in range(len(slots))])
    cache.bind(slots, columns, width)
    for index, layer in enumerate(cache.layers):
        keys, values = fresh(len(slots), 2)
        read_keys, read_values = layer.update(keys, values)
        for part, new, read in ((0, keys, read_keys), (1, values, read_values)):
            expected = before[index, part].clone()
            for row, slot in enumerate(slots):
                expected[slot, :, columns[row]] = new[row]
            assert torch.equal(cache.store[index, part], expected)
            assert torch.equal(read, expected[slots][:, :, :width])


def test_neighbours_are_read_without_a_copy(cache):
    cache.bind([1, 2, 3], torch.zeros(3, 1, dtype=torch.long), 4)
    keys, values = cache.layers[1].update(*fresh(3, 1))
    assert keys.data_ptr() == cache.store[1, 0, 1].data_ptr()
    assert values.data_ptr() == cache.store[1, 1, 1].data_ptr()


def test_padding_goes_to_a_column_that_nobody_can_read(cache):
    before = cache.store.clone()
    cache.bind([2, 3], torch.tensor([[0, 1, 2], [0, CAPACITY, CAPACITY]]), 3)
    keys, values = fresh(2, 3)
    keys[1, :, 1:] = torch.nan
    read, _ = cache.layers[0].update(keys, values)
    assert read.isfinite().all()
    assert torch.equal(cache.store[0, 0, 3, :, 0], keys[1, :, 0])
    assert torch.equal(cache.store[0, 0, 3, :, 1:CAPACITY], before[0, 0, 3, :, 1:CAPACITY])
    # However wide a pass may read, that column lies beyond.
    cache.bind([3], torch.tensor([[CAPACITY - 1]]), CAPACITY)
    read, _ = cache.layers[0].update(*fresh(1, 1))
    assert read.shape[2] == CAPACITY
    assert read.isfinite().all()


def test_a_new_cache_is_all_zeros_and_tells_its_sizes(cache):
    assert not cache.store.any()
    assert cache.store.shape == (2, 2, SLOTS, 2, CAPACITY + 1, 8)
    cache.bind([0], torch.tensor([[4]]), 5)
    assert cache.get_seq_length() == 5
    assert cache.layers[0].get_mask_sizes(1) == (5, 0)
    assert cache.layers[0].get_max_length() == CAPACITY


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_scattered_slots_give_what_a_cache_of_their_own_gives(kind):
    base = tiny.base(kind)
    cache = KVCache(base, SLOTS, CAPACITY)
    ids, slots = torch.randint(3, 40, (3, 4), generator=torch.Generator().manual_seed(1)), [0, 2, 3]
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4)):
            columns = torch.arange(start, end).expand(3, -1)
            cache.bind(slots, columns, end)
            mask = torch.arange(end) <= columns[..., None]
            embeds = base.get_input_embeddings()(ids[:, start:end])
            found = base.base_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask(base, mask, embeds.dtype),
                position_ids=columns,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        own = DynamicCache()
        expected = base.base_model(input_ids=ids, past_key_values=own, use_cache=True).last_hidden_state
    torch.testing.assert_close(found, expected[:, 3:], rtol=1e-4, atol=1e-5)
    for index, layer in enumerate(own.layers):
        torch.testing.assert_close(cache.store[index, 0, slots, :, :4], layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.store[index, 1, slots, :, :4], layer.values, rtol=1e-4, atol=1e-5)


# -- keeping house ---------------------------------------------------------------------------------------


def test_moving_copies_so_many_columns(cache):
    cache.store.normal_()
    before = cache.store.clone()
    cache.move(4, 1, 3)
    assert torch.equal(cache.store[:, :, 1, :, :3], before[:, :, 4, :, :3])
    expected = before.clone()
    expected[:, :, 1, :, :3] = before[:, :, 4, :, :3]
    assert torch.equal(cache.store, expected)


def test_what_was_taken_can_be_put_elsewhere_and_does_not_change_meanwhile(cache):
    cache.store.normal_()
    before = cache.store.clone()
    block = cache.take(1, 2, 5)
    assert block.shape == (2, 2, 2, 3, 8)
    cache.wipe(1, 0, CAPACITY)
    cache.put(3, 4, block)
    assert torch.equal(cache.store[:, :, 3, :, 4:7], before[:, :, 1, :, 2:5])
    expected = before.clone()
    expected[:, :, 1, :, :CAPACITY] = 0
    expected[:, :, 3, :, 4:7] = before[:, :, 1, :, 2:5]
    assert torch.equal(cache.store, expected)


def test_wiping_forgets_what_is_not_finite(cache):
    cache.store[:, :, 2, :, 3:6] = torch.nan
    cache.wipe(2, 3, 6)
    assert not cache.store.any()


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_column_costs_what_transformers_own_cache_holds(kind, dtype):
    base = tiny.base(kind).to(dtype)
    with torch.no_grad():
        own = base(input_ids=torch.arange(3, 10)[None], use_cache=True).past_key_values
    keys = own.layers[0].keys
    assert shape(base) == (len(own.layers), keys.shape[1], keys.shape[3])
    assert position_bytes(base) * 7 == sum(layer.keys.nbytes + layer.values.nbytes for layer in own.layers)
    cache = KVCache(base, SLOTS, CAPACITY)
    assert cache.store.nbytes == position_bytes(base) * SLOTS * (CAPACITY + 1)
    assert cache.store.dtype == dtype


def test_a_head_width_of_its_own_is_read_from_the_config():
    base = tiny.base("qwen3")
    base.config.head_dim = 16
    assert shape(base) == (2, 2, 16)


def test_layers_of_different_shape_are_refused():
    config = SimpleNamespace(num_key_value_heads=[2, 1], num_attention_heads=4, hidden_size=32, num_hidden_layers=2)
    base = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    with pytest.raises(ConfigError, match="different shape"):
        shape(base)
