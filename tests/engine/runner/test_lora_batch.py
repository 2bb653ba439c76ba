"""The adapter bank against PEFT itself: each row as if its adapter alone were there."""

import warnings

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from slr_core.engine.runner import lora_batch as bank_module
from slr_core.engine.runner.lora_batch import LoraBatch, LoraBatchLinear
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


def peft_says(base, embeds, names):
    """States of each row by PEFT, its adapter set as PEFT's own users do."""
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


def bank_says(bank, embeds, places):
    bank.use(places)
    with torch.no_grad():
        return bank.model.base_model(inputs_embeds=embeds).last_hidden_state


def inputs(rows, queries=1, seed=3):
    return torch.randn(rows, queries, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A base with PEFT's adapters a, b, c, and a bank that holds them."""
    base = adapted(request.param)
    bank = LoraBatch(base)
    bank.fill([(base, name) for name in "abc"])
    return base, bank


PLACES = {"a": 0, "b": 1, "c": 2, None: None}
MIXES = {
    "one-each": ["a", "b", "c"],
    "permuted": ["c", "a", "b", "a", "c", "b"],
    "uneven": ["b", "b", "b", "a", "b"],
    "rows-without": ["a", None, "b", None, None, "c", "a"],
    "one-and-none": [None, "c"],
    "none-first-and-last": [None, "b", "a", None],
}


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_batch_is_what_peft_gives_row_by_row(pair, mix, method, queries):
    base, bank = pair
    for layer in bank.layers.values():
        layer.method = method
    names, embeds = MIXES[mix], inputs(len(MIXES[mix]), queries)
    found = bank_says(bank, embeds, [PLACES[name] for name in names])
    torch.testing.assert_close(found, peft_says(base, embeds, names), **TOLERANCE)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", ["a", "b", "c", None])
def test_a_batch_that_shares_an_adapter_is_what_peft_gives(pair, name, queries):
    base, bank = pair
    embeds = inputs(3, queries)
    found = bank_says(bank, embeds, [PLACES[name]] * 3)
    torch.testing.assert_close(found, peft_says(base, embeds, [name] * 3), **TOLERANCE)
    if name is not None:
        plain = bank_says(bank, embeds, [None] * 3)
        assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_is_not_finite_spoils_no_other(pair, method):
    base, bank = pair
    for layer in bank.layers.values():
        layer.method = method
    names, embeds = ["a", "b", "a", None, "c"], inputs(5, 2)
    expected = peft_says(base, embeds, names)
    for bad in range(5):
        spoiled = embeds.clone()
        spoiled[bad] = torch.nan
        found = bank_says(bank, spoiled, [PLACES[name] for name in names])
        clean = [row for row in range(5) if row != bad]
        torch.testing.assert_close(found[clean], expected[clean], **TOLERANCE)


# -- the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_shared_and_left_as_it_was(kind):
    base = adapted(kind)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    modules = {name: type(module) for name, module in base.named_modules()}
    bank = LoraBatch(base)
    bank.fill([(base, name) for name in "abc"])
    bank.tune(4, 2)
    bank_says(bank, inputs(3), [0, 1, None])
    assert {name: type(module) for name, module in base.named_modules()} == modules
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name
    own = {x.data_ptr() for x in base.parameters()}
    assert {x.data_ptr() for x in bank.model.parameters()} <= own
    assert not any(isinstance(module, LoraLayer) for module in bank.model.modules())
    assert bank.model.get_output_embeddings().weight is base.get_output_embeddings().weight


@pytest.mark.parametrize("adapters", [0, 1])
def test_a_base_without_adapters_to_mix_is_the_base(adapters):
    base = tiny.base() if adapters == 0 else adapted(names="a")
    bank = LoraBatch(base)
    bank.fill([(base, "a")] * adapters)
    embeds = inputs(2, 3)
    found = bank_says(bank, embeds, [None, None])
    torch.testing.assert_close(found, peft_says(base, embeds, [None, None]), **TOLERANCE)
    assert bank.tune(8, 1) == {}
    if adapters:
        torch.testing.assert_close(
            bank_says(bank, embeds, [None, 0]), peft_says(base, embeds, [None, "a"]), **TOLERANCE
        )


def test_the_bank_is_used_by_nobody_but_the_engine():
    # A reasoner may run beside its engine: what one switches must not reach the other.
    base = adapted()
    bank = LoraBatch(base)
    bank.fill([(base, name) for name in "abc"])
    embeds = inputs(2)
    expected = peft_says(base, embeds, ["a", "b"])
    bank.use([2, 1])
    assert torch.equal(peft_says(base, embeds, ["a", "b"]), expected)
    torch.testing.assert_close(bank_says(bank, embeds, [0, 1]), expected, **TOLERANCE)


# -- filling again ---------------------------------------------------------------------------------------


def test_sets_come_and_go():
    first, second = adapted(names="ab"), adapted(names="bc", seed=7)
    bank = LoraBatch(first)
    embeds = inputs(4, 2)

    def check(places, models_and_names):
        found = bank_says(bank, embeds, places)
        for row, (model, name) in enumerate(models_and_names):
            expected = peft_says(model, embeds[row : row + 1], [name])[0]
            torch.testing.assert_close(found[row], expected, **TOLERANCE)

    for method in METHODS:
        bank.fill([(first, "a"), (first, "b")])
        for layer in bank.layers.values():
            layer.method = method
        check([0, 1, None, 0], [(first, "a"), (first, "b"), (first, None), (first, "a")])
        # `c` acts on layers that no adapter of the first set touches.
        bank.fill([(first, "a"), (first, "b"), (second, "b"), (second, "c")])
        for layer in bank.layers.values():
            layer.method = method
        check([3, 2, 1, 0], [(second, "c"), (second, "b"), (first, "b"), (first, "a")])
        bank.fill([(second, "c")])
        check([0, None, 0, 0], [(second, "c"), (second, None), (second, "c"), (second, "c")])
        bank.fill([])
        check([None] * 4, [(first, None)] * 4)


def test_what_nobody_holds_any_longer_takes_no_memory():
    base = adapted(names="ac")
    bank = LoraBatch(base)
    bank.fill([(base, "a"), (base, "c")])
    bank.fill([(base, "a")])
    for path, layer in bank.layers.items():
        held = sum(x.numel() for x in (layer.down, layer.up, layer.flat_down, layer.flat_up))
        assert (held > 0) == any(path.endswith(name) for name in TARGETS[False]["a"]), path


# -- choosing a way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3])
def test_a_way_is_chosen_for_every_shape(pair, queries):
    _, bank = pair
    chosen = bank.tune(6, queries)
    layers = [layer for layer in bank.layers.values() if layer.acts]
    assert set(chosen) == {(layer.down.shape[1], layer.up.shape[2]) for layer in layers}
    assert set(chosen.values()) <= set(METHODS)
    for layer in layers:
        assert isinstance(layer, LoraBatchLinear)
        assert layer.method == chosen[layer.down.shape[1], layer.up.shape[2]]


def test_choosing_leaves_the_global_generator_alone():
    base = adapted(names="ab")
    bank = LoraBatch(base)
    bank.fill([(base, "a"), (base, "b")])
    state = torch.get_rng_state()
    bank.tune(4, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_way_is_chosen_on_several_layers_of_a_shape(pair, monkeypatch):
    _, bank = pair
    met = []
    for method, compute in bank_module._METHODS.items():
        monkeypatch.setitem(
            bank_module._METHODS,
            method,
            lambda layer, *rest, compute=compute: (met.append(layer), compute(layer, *rest))[1],
        )
    bank.tune(4, 1)
    layers = [layer for layer in bank.layers.values() if layer.acts]
    assert set(met) == set(layers)  # two layers, fewer of each shape than are measured
