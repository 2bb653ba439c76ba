"""Modules that an adapter config targets: as PEFT matches them, in linear time, and nothing unmatched in silence."""

import re
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from slr_core.errors import ConfigError
from slr_core.loop.lora import attach
from slr_core.loop.targets import MAX_PATTERN, MAX_PATTERNS, resolve_targets
from tests import tiny

HOSTILE = "(?:(?:(?:(?:[a-z._0-9]+)+)+)+)+!"
UNSLOTH = (
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:o_proj|down_proj)))"
)


@pytest.fixture(scope="module")
def base():
    return tiny.base("llama")


def config(**fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | fields)


def layers(model):
    return {
        name: (module.r["x"], module.scaling["x"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def as_peft(fields):
    """What PEFT itself makes of a config."""
    model = tiny.base("llama")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config(**fields), model, adapter_name="x")
    return layers(model)


def as_here(fields):
    model = tiny.base("llama")
    with torch.device("meta"):
        attach(model, {"x": config(**fields)})
    return layers(model)


SAME_AS_PEFT = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": UNSLOTH},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["lay.*s"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.*": 3, "q_proj": 5}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 5, r"layers\.(0|1)\.self_attn\.\w+": 3}},
    {"target_modules": "all-linear", "rank_pattern": {r".*mlp\.(up|down)_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 0.5}, "use_rslora": True},
]


@pytest.mark.parametrize("fields", SAME_AS_PEFT)
def test_same_modules_as_peft(fields):
    assert as_here(fields) == as_peft(fields)


names = st.sampled_from(["q_proj", "v_proj", "down_proj", "self_attn.q_proj", "layers.1.mlp.down_proj"])
patterns = names | st.sampled_from([r".*\.q_proj", "layers.0.*", r"layers\.\d\.mlp\..*", "^model.*proj", "(k|v)_proj"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(names, min_size=1, max_size=3),
    st.dictionaries(patterns, st.integers(1, 4), max_size=3),
    st.dictionaries(patterns, st.integers(1, 4), max_size=3),
)
def test_patterns_as_peft(targets, ranks, alphas):
    fields = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
    expected = as_peft(fields)
    unused = [p for p in (*ranks, *alphas) if not any(re.match(rf"(.*\.)?({p})$", name) for name in expected)]
    if unused:
        with pytest.raises(ConfigError, match="matches no target module"):
            as_here(fields)
    else:
        assert as_here(fields) == expected


UNMATCHED = {
    "target_modules": {"target_modules": r".*\.nonesuch"},
    "'nonesuch'": {"target_modules": ["q_proj", "nonesuch"]},
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": ["nonesuch"]},
    "exclude_modules '.*k_porj'": {"target_modules": ["q_proj"], "exclude_modules": ".*k_porj"},
    "rank_pattern": {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}},
    "rank_pattern: 'q_porj'": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3, "q_porj": 3}},
    "alpha_pattern": {"target_modules": ["q_proj"], "alpha_pattern": {".*k_proj": 3}},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
    "layer 9": {"target_modules": ["q_proj"], "layers_to_transform": [0, 9]},
    "no module of target_modules": {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
}


@pytest.mark.parametrize("named", UNMATCHED)
def test_what_matches_nothing_is_reported(named, base):
    with pytest.raises(ConfigError, match=re.escape(named)):
        resolve_targets(base, config(**UNMATCHED[named]))


HOSTILE_FIELDS = [
    {"target_modules": HOSTILE},
    {"target_modules": ["q_proj"], "exclude_modules": HOSTILE},
    {"target_modules": ["q_proj"], "rank_pattern": {HOSTILE: 3}},
    {"target_modules": ["q_proj"], "alpha_pattern": {HOSTILE: 3}},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [HOSTILE]},
    {"target_modules": "(" * 3000 + "a*" + ")*" * 500},
    {"target_modules": "a" * (MAX_PATTERN + 1)},
    {"target_modules": r"(?=q)\1"},
    {"target_modules": "(((a{1000}){1000}){1000}){1000}"},
    {"target_modules": "\ud800*"},
    {"target_modules": [f"q{i}" for i in range(10**6)]},
    {"target_modules": ["q_proj"], "rank_pattern": {f"q_proj|{i}": 3 for i in range(MAX_PATTERNS + 1)}},
    {"target_modules": ["q_proj"], "rank_pattern": {f"x{i}": 3 for i in range(10**5)}},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": "3"}},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2.5}},
    {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": float("nan")}},
    {"target_modules": ["q_proj"], "rank_pattern": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": [[0]]},
    {"target_modules": [["q_proj"]]},
    {"target_modules": 7},
]


@pytest.mark.parametrize("case", range(len(HOSTILE_FIELDS)))
def test_hostile_patterns_are_refused_at_once(case, base):
    made = config()
    vars(made).update(HOSTILE_FIELDS[case])
    started = time.perf_counter()
    with pytest.raises(ConfigError):
        resolve_targets(base, made)
    assert time.perf_counter() - started < 5


def test_the_config_itself_stays_as_it_is():
    made = config(target_modules=r".*\.q_proj", rank_pattern={"layers.0.*": 3}, init_lora_weights="gaussian")
    attach(tiny.base("llama"), {"x": made})
    assert (made.target_modules, made.rank_pattern) == (r".*\.q_proj", {"layers.0.*": 3})
    assert made.init_lora_weights == "gaussian"
