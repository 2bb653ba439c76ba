import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from slr_core.config import LoopConfig, LoopLoraConfig
from slr_core.errors import ConfigError, RequestError
from slr_core.loop import lora
from slr_core.loop.lora import DECODE, LoopAdapters, attach, lora_layers, new_adapter_configs, trained_index
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from tests import tiny

SIZES = {"loop_01": 2, "loop_02": 5}
"""Ranks of adapters."""


@given(st.integers(1, 300), st.integers(1, 64))
def test_trained_iterations_use_their_own_weights(t, trained):
    for policy in ("last", "cycle", "error"):
        if t <= trained:
            assert trained_index(t, trained, policy) == t
    if t > trained:
        assert trained_index(t, trained, "last") == trained
        assert trained_index(t, trained, "cycle") == trained_index(t - trained, trained, "cycle")
        with pytest.raises(RequestError, match=f"{t} lies past .* {trained}") as caught:
            trained_index(t, trained, "error")
        assert caught.value.param == "max_iterations"


@pytest.mark.parametrize(
    ("policy", "names"),
    [("last", [1, 2, 3, 3, 3, 3, 3]), ("cycle", [1, 2, 3, 1, 2, 3, 1])],
)
def test_past_the_end_adapters_follow_the_policy(policy, names):
    made = tiny.reasoner(loop={"lora": {"past_end": policy}})
    assert [made.adapter_name(t) for t in range(8)] == [None, *(f"loop_{n:02d}" for n in names)]
    output = run(made, 7)
    assert [record.adapter for record in output.records[0]] == [f"loop_{n:02d}" for n in names]


def test_past_the_end_can_be_an_error():
    made = tiny.reasoner(loop={"lora": {"past_end": "error"}, "max_iterations": 3})
    assert run(made, 3).iterations == [3]
    with pytest.raises(RequestError, match="at most 3"):
        LoopParams(max_iterations=4).resolve(made.config)


@pytest.mark.parametrize("timestep", ["none", "learned", "sinusoidal"])
def test_shared_adapter_with_policy_error(timestep):
    loop = {"lora": {"kind": "shared", "past_end": "error"}, "max_iterations": 3, "timestep": {"kind": timestep}}
    made = tiny.reasoner(loop=loop)
    output = run(made, 3)
    assert [record.adapter for record in output.records[0]] == ["loop_01"] * 3


def test_kinds_name_their_adapters():
    names = {
        kind: LoopConfig(trained_iterations=3, lora=LoopLoraConfig(kind=kind)).adapters
        for kind in ("per_iteration", "shared", "none")
    }
    assert names == {"per_iteration": ("loop_01", "loop_02", "loop_03"), "shared": ("loop_01",), "none": ()}


def run(made, iterations):
    settings = LoopParams(max_iterations=iterations, criterion="fixed").resolve(made.config)
    with torch.inference_mode():
        return loop_until_exit(made, made.encode(*tiny.batch([tiny.PROMPTS[1]])), [settings])


# -- attaching and switching ---------------------------------------------------------------------------


@pytest.fixture
def plain():
    return tiny.base()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]])).logits


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fresh_adapters_change_nothing(kind):
    made = tiny.reasoner(kind, loop={"lora": {"rank": 3}}, plain=tiny.base(kind))
    plain = tiny.base(kind)
    torch.testing.assert_close(logits(made.base), logits(plain))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    with made.adapters.use("loop_02"):
        torch.testing.assert_close(logits(made.base), logits(plain))


def test_one_adapter_acts_at_a_time_and_none_outside():
    made = tiny.reasoner()
    before = logits(made.base)
    seen = {}
    for name in ("loop_01", "loop_02", "loop_03"):
        with made.adapters.use(name):
            seen[name] = logits(made.base)
        torch.testing.assert_close(logits(made.base), before, rtol=0, atol=0)
    assert all((x - before).abs().max() > 1e-3 for x in seen.values())
    assert (seen["loop_01"] - seen["loop_02"]).abs().max() > 1e-3
    with made.adapters.use(None):
        torch.testing.assert_close(logits(made.base), before, rtol=0, atol=0)


def test_an_error_inside_leaves_no_adapter_active():
    made = tiny.reasoner()
    before = logits(made.base)

    def fail():
        with made.adapters.use("loop_01"):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    torch.testing.assert_close(logits(made.base), before, rtol=0, atol=0)


def test_nothing_is_frozen_that_was_not_before(plain):
    plain.model.norm.weight.requires_grad_(False)
    plain.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    attach(plain, new_adapter_configs(tiny.config().loop))
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {"model.norm.weight", "model.layers.0.self_attn.q_proj.base_layer.weight"}
    LoopAdapters(plain)
    with LoopAdapters(plain).use("loop_02"):
        assert {name for name, p in plain.named_parameters() if not p.requires_grad} == frozen


def test_default_targets_are_the_linear_layers_without_the_head(plain):
    attach(plain, new_adapter_configs(tiny.config().loop))
    adapted = {name.rsplit(".", 1)[1] for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, module in plain.named_modules():
        if hasattr(module, "lora_A"):
            assert set(module.lora_A) == {"loop_01", "loop_02", "loop_03"}, name


def test_rank_and_alpha_reach_the_layers(plain):
    loop = tiny.config({"lora": {"rank": 5, "alpha": 20, "target_modules": ["v_proj"]}}).loop
    attach(plain, new_adapter_configs(loop))
    layer = plain.model.layers[1].self_attn.v_proj
    assert layer.lora_A["loop_03"].weight.shape == (5, 32)
    assert layer.scaling["loop_03"] == 4.0
    assert not hasattr(plain.model.layers[1].self_attn.q_proj, "lora_A")


def test_ranks_may_differ_by_iteration(plain):
    loop = tiny.config({"lora": {"rank": [1, 4, 2], "alpha": 8, "target_modules": ["v_proj"]}}).loop
    attach(plain, new_adapter_configs(loop))
    layer = plain.model.layers[0].self_attn.v_proj
    assert [layer.lora_A[name].weight.shape for name in loop.adapters] == [(1, 32), (4, 32), (2, 32)]
    assert [layer.scaling[name] for name in loop.adapters] == [8, 2, 4]
    assert run(tiny.reasoner(loop={"lora": {"rank": [1, 4, 2]}}), 5).iterations == [5]


@pytest.mark.parametrize("kind", ["per_iteration", "shared", "none"])
def test_the_adapter_decode_has_a_rank_of_its_own(kind):
    configs = new_adapter_configs(tiny.config({"lora": {"kind": kind, "decode_rank": 5}}).loop)
    loop_adapters = {"per_iteration": 3, "shared": 1, "none": 0}[kind]
    assert list(configs)[-1] == DECODE
    assert [config.r for config in configs.values()] == [2] * loop_adapters + [5]
    assert configs[DECODE].lora_alpha == 4
    assert DECODE in tiny.reasoner(loop={"lora": {"kind": kind, "decode_rank": 5}}).adapters.names
    assert DECODE not in tiny.reasoner(loop={"lora": {"kind": kind}}).adapters.names


def test_unknown_target_modules_are_a_config_error(plain):
    with pytest.raises(ConfigError, match=r"loop_01.*no_such_layer"):
        attach(plain, new_adapter_configs(tiny.config({"lora": {"target_modules": ["no_such_layer"]}}).loop))


REFUSED = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "bias": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding-by-pattern": {"target_modules": r".*embed_tokens"},
    "head-by-pattern": {"target_modules": r".*(q_proj|lm_head)"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_on_inner_layers_is_refused_by_name(case, plain):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **REFUSED[case]})
    with pytest.raises(ConfigError, match=r"loop_01.*(use plain LoRA|not supported)"):
        attach(plain, {"loop_01": config})


def test_an_adapter_that_would_rewrite_the_base_weights_does_not(plain):
    # PiSSA's start subtracts the adapter from the layer that it wraps.
    before = plain.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    try:
        attach(plain, {"loop_01": config})
    except ConfigError:
        return
    after = plain.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(before, after)


def test_adapters_of_other_sizes_are_added_as_by_peft(plain, monkeypatch):
    """Without another search for the layers, which takes seconds in a large model."""

    def configs():
        return {name: LoraConfig(r=r, lora_alpha=3 * r, target_modules="all-linear") for name, r in SIZES.items()}

    searches, theirs = [], tiny.base()
    for name, config in configs().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, theirs, adapter_name=name)
    monkeypatch.setattr(
        lora,
        "inject_adapter_in_model",
        lambda *args, **options: (searches.append(1), inject_adapter_in_model(*args, **options))[1],
    )
    attach(plain, ours := configs())
    assert len(searches) == 1
    assert {key: x.shape for key, x in plain.state_dict().items()} == {
        key: x.shape for key, x in theirs.state_dict().items()
    }
    for path, layer in lora_layers(theirs).items():
        assert lora_layers(plain)[path].scaling == layer.scaling
    assert ours["loop_02"].target_modules == ours["loop_01"].target_modules != "all-linear"
    attach(other := tiny.base(), {"loop_01": configs()["loop_01"], "decode": LoraConfig(target_modules=["q_proj"])})
    assert "decode" not in other.model.layers[0].mlp.up_proj.lora_A


def test_conv1d_layers_raise_no_warning():
    plain = tiny.base("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(plain, new_adapter_configs(tiny.config().loop))
    assert isinstance(plain.transformer.h[0].attn.c_attn.lora_A["loop_01"], torch.nn.Linear)
