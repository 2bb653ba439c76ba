"""The LoRA batch against PEFT, row by row."""

import warnings

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from slr_core.engine.runner import lora_batch as module
from slr_core.engine.runner.lora_batch import AdapterGroups, LoraBatch, LoraBatchLinear
from slr_core.loop.lora import attach
from tests import tiny

METHODS = ("masked", "grouped", "segments")
KINDS = ("llama", "qwen2", "gpt2")
# Unequal ranks, scales and target modules; by architecture, as GPT-2 names its layers differently.
TARGETS = {
    False: {"a": ["q_proj", "v_proj"], "b": ["q_proj", "down_proj"], "c": ["o_proj", "gate_proj", "q_proj"]},
    True: {"a": ["c_attn"], "b": ["c_attn", "c_proj"], "c": ["c_fc", "c_proj"]},
}
RANKS = {"a": (2, 4), "b": (5, 3), "c": (1, 7)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(kind="llama", names="abc", seed=0):
    """A tiny base with PEFT's adapters, none of which is a no-op."""
    base, targets = tiny.base(kind), TARGETS[kind == "gpt2"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        attach(
            base,
            {
                name: LoraConfig(r=RANKS[name][0], lora_alpha=RANKS[name][1], target_modules=targets[name])
                for name in names
            },
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return base


def run_peft(base, embeds, names):
    """States of each row by PEFT, with its adapter chosen by PEFT's own methods."""
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    states = []
    with torch.no_grad():
        for row, name in zip(embeds, names, strict=True):
            for layer in layers:
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter(name)
            states.append(base.base_model(inputs_embeds=row[None]).last_hidden_state[0])
    return torch.stack(states)


def run_batch(lora_batch, embeds, ids):
    lora_batch.use(ids)
    with torch.no_grad():
        return lora_batch.model.base_model(inputs_embeds=embeds).last_hidden_state


def inputs(rows, queries=1, seed=3):
    return torch.randn(rows, queries, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A base with PEFT's adapters a, b, c, and a LoraBatch that holds them."""
    base = adapted(request.param)
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, name) for name in "abc"])
    return base, lora_batch


IDS = {"a": 0, "b": 1, "c": 2, None: None}
MIXES = {
    "one-each": ["a", "b", "c"],
    "permuted": ["c", "a", "b", "a", "c", "b"],
    "uneven": ["b", "b", "b", "a", "b"],
    "rows-without": ["a", None, "b", None, None, "c", "a"],
    "one-and-none": [None, "c"],
    "none-first-and-last": [None, "b", "a", None],
    "sorted": [None, "a", "a", "b", "c", "c"],
    "sorted-but-last": ["a", "a", "b", "a"],
}


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batch(pair, mix, method, queries):
    base, lora_batch = pair
    for layer in lora_batch.layers.values():
        layer.method = method
    names, embeds = MIXES[mix], inputs(len(MIXES[mix]), queries)
    found = run_batch(lora_batch, embeds, [IDS[name] for name in names])
    torch.testing.assert_close(found, run_peft(base, embeds, names), **TOLERANCE)


def test_segments_are_slices_where_rows_are_neighbours():
    first, second = AdapterGroups([None, 1, 1, 0, 2, 0], 3, torch.device("cpu")).segments[:2]
    assert first[0] == 0
    assert first[1].tolist() == [3, 5]
    assert second == (1, slice(1, 3))


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", ["a", "b", "c", None])
def test_batch_with_one_adapter(pair, name, queries):
    base, lora_batch = pair
    embeds = inputs(3, queries)
    found = run_batch(lora_batch, embeds, [IDS[name]] * 3)
    torch.testing.assert_close(found, run_peft(base, embeds, [name] * 3), **TOLERANCE)
    if name is not None:
        plain = run_batch(lora_batch, embeds, [None] * 3)
        assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_row_changes_no_other(pair, method):
    base, lora_batch = pair
    for layer in lora_batch.layers.values():
        layer.method = method
    names, embeds = ["a", "b", "a", None, "c"], inputs(5, 2)
    expected = run_peft(base, embeds, names)
    for bad in range(5):
        with_nan = embeds.clone()
        with_nan[bad] = torch.nan
        found = run_batch(lora_batch, with_nan, [IDS[name] for name in names])
        clean = [row for row in range(5) if row != bad]
        torch.testing.assert_close(found[clean], expected[clean], **TOLERANCE)


# -- the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_base_weights_are_shared_and_unchanged(kind):
    base = adapted(kind)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    modules = {name: type(module) for name, module in base.named_modules()}
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, name) for name in "abc"])
    lora_batch.tune(4, 2)
    run_batch(lora_batch, inputs(3), [0, 1, None])
    assert {name: type(module) for name, module in base.named_modules()} == modules
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name
    shared = {x.data_ptr() for x in base.parameters()}
    assert {x.data_ptr() for x in lora_batch.model.parameters()} <= shared
    assert not any(isinstance(module, LoraLayer) for module in lora_batch.model.modules())
    assert lora_batch.model.get_output_embeddings().weight is base.get_output_embeddings().weight


@pytest.mark.parametrize("adapters", [0, 1])
def test_fewer_than_two_adapters(adapters):
    base = tiny.base() if adapters == 0 else adapted(names="a")
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, "a")] * adapters)
    embeds = inputs(2, 3)
    found = run_batch(lora_batch, embeds, [None, None])
    torch.testing.assert_close(found, run_peft(base, embeds, [None, None]), **TOLERANCE)
    assert lora_batch.tune(8, 1) == {}
    if adapters:
        torch.testing.assert_close(
            run_batch(lora_batch, embeds, [None, 0]), run_peft(base, embeds, [None, "a"]), **TOLERANCE
        )


def test_reasoner_and_batch_do_not_affect_each_other():
    base = adapted()
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, name) for name in "abc"])
    embeds = inputs(2)
    expected = run_peft(base, embeds, ["a", "b"])
    lora_batch.use([2, 1])
    assert torch.equal(run_peft(base, embeds, ["a", "b"]), expected)
    torch.testing.assert_close(run_batch(lora_batch, embeds, [0, 1]), expected, **TOLERANCE)


# -- replacing adapters------------------------------------------------------------------------------------


def test_set_adapters_again():
    first, second = adapted(names="ab"), adapted(names="bc", seed=7)
    lora_batch = LoraBatch(first)
    embeds = inputs(4, 2)

    def check(ids, models_and_names):
        found = run_batch(lora_batch, embeds, ids)
        for row, (model, name) in enumerate(models_and_names):
            expected = run_peft(model, embeds[row : row + 1], [name])[0]
            torch.testing.assert_close(found[row], expected, **TOLERANCE)

    for method in METHODS:
        lora_batch.set_adapters([(first, "a"), (first, "b")])
        for layer in lora_batch.layers.values():
            layer.method = method
        check([0, 1, None, 0], [(first, "a"), (first, "b"), (first, None), (first, "a")])
        # `c` has layers that no adapter of the first set has.
        lora_batch.set_adapters([(first, "a"), (first, "b"), (second, "b"), (second, "c")])
        for layer in lora_batch.layers.values():
            layer.method = method
        check([3, 2, 1, 0], [(second, "c"), (second, "b"), (first, "b"), (first, "a")])
        lora_batch.set_adapters([(second, "c")])
        check([0, None, 0, 0], [(second, "c"), (second, None), (second, "c"), (second, "c")])
        lora_batch.set_adapters([])
        check([None] * 4, [(first, None)] * 4)


def test_removed_adapters_use_no_memory():
    base = adapted(names="ac")
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, "a"), (base, "c")])
    lora_batch.set_adapters([(base, "a")])
    for path, layer in lora_batch.layers.items():
        size = sum(x.numel() for x in layer.weights[:4])
        assert (size > 0) == any(path.endswith(name) for name in TARGETS[False]["a"]), path


# -- tuning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3])
def test_tune_chooses_a_method_for_every_shape(pair, queries):
    _, lora_batch = pair
    chosen = lora_batch.tune(6, queries)
    layers = [layer for layer in lora_batch.layers.values() if layer.has_weights]
    assert set(chosen) == {(layer.weights.down.shape[1], layer.weights.up.shape[2]) for layer in layers}
    assert set(chosen.values()) <= set(METHODS)
    for layer in layers:
        assert isinstance(layer, LoraBatchLinear)
        assert layer.method == chosen[layer.weights.down.shape[1], layer.weights.up.shape[2]]


def test_tune_does_not_use_the_global_generator():
    base = adapted(names="ab")
    lora_batch = LoraBatch(base)
    lora_batch.set_adapters([(base, "a"), (base, "b")])
    state = torch.get_rng_state()
    lora_batch.tune(4, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_tune_times_several_layers_of_a_shape(pair, monkeypatch):
    _, lora_batch = pair
    timed = []
    for method, compute in module._METHODS.items():
        monkeypatch.setitem(
            module._METHODS,
            method,
            lambda weights, *rest, compute=compute: (timed.append(id(weights)), compute(weights, *rest))[1],
        )
    lora_batch.tune(4, 1)
    layers = [layer for layer in lora_batch.layers.values() if layer.has_weights]
    assert set(timed) == {id(layer.weights) for layer in layers}  # the model has two layers, fewer than are timed
