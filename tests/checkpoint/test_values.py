"""Whatever a checkpoint's JSON files say, it loads and runs, or is refused before memory of such a size is taken."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from slr_core.config import FORMAT_VERSION
from tests.checkpoint.damage import cases, checkpoints, damaged, named, workspaces


@pytest.fixture(scope="module")
def folders():
    with checkpoints() as made:
        yield made


def nested(depth: int, inside: object = 1, key: str | None = "loop") -> object:
    for _ in range(depth):
        inside = [inside] if key is None else {key: inside}
    return inside


ABSURD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 4096, 8192, 10**5, 10**6, 10**9, 10**12, -(10**9)),
    *(2**31, 2**31 - 1, 2**63, 2**63 - 1, -(2**63), 10**30, 10**400, 10**4000),
    *(0.0, -0.5, 0.5, 1e-45, 1e38, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "x", "x" * 10**5, "a/b", "../..", "/etc/passwd", "\0", "\n\n", "\ud800", "none", "cuda", "int8"),
    *(
        "float8_e4m3fn",
        "complex64",
        "float16",
        "bfloat16",
        "nonesuch",
        "LlamaForCausalLM",
        "eager",
        "(a+)+$",
        "{{ 1/0 }}",
    ),
    *([], {}, [1], [None], ["x"], {"x": 1}, [10**9], [1] * 1000, list(range(5000)), {"": ""}, {"x": {"y": [10**30]}}),
    *(nested(30), nested(400), nested(900), nested(300, key=None), nested(900, key=None)),
]
ADDED = [
    *("num_labels", "quantization_config", "auto_map", "layer_types", "sliding_window", "rope_scaling", "head_dim"),
    *(
        "partial_rotary_factor",
        "text_config",
        "torch_dtype",
        "n_embd",
        "n_inner",
        "num_local_experts",
        "attn_implementation",
    ),
    *("_attn_implementation", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern"),
    *(
        "layers_to_transform",
        "loftq_config",
        "eva_config",
        "runtime_config",
        "speed",
        "x" * 10**5,
        "\n",
        "tokenizer_class",
    ),
    *("added_tokens_decoder", "extra_special_tokens", "max_length", "eos_token_id", "pruned_heads", "id2label"),
]


def places(data, at=()):
    """Paths to every value of parsed JSON."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data[:4]):
            yield (*at, key)
            yield from places(value, (*at, key))


def put(data, place, value):
    *way, last = place
    for key in way:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


@pytest.mark.slow
@cases(50)
@given(data=st.data(), workspace=workspaces)
def test_absurd_values(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder, ".json"))
    content = json.loads(folder.files[name])
    known = list(places(content))
    place = data.draw(st.sampled_from(known) | st.sampled_from([(key,) for key in ADDED]))
    gone = place in known and data.draw(st.integers(0, 9)) == 0
    put(content, place, ... if gone else data.draw(st.sampled_from(ABSURD)))
    damaged(folder, {name: dumped(content)})


def dumped(content) -> bytes:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(content).encode()
    finally:
        sys.set_int_max_str_digits(limit)


BASE, LOOP, ADAPTER, TOKENIZER = "base/config.json", "slr_config.json", "loops/loop_01/adapter_config.json", "tokenizer"
HUGE = {
    "vocabulary": ("append", BASE, ("vocab_size",), 10**11),
    "width": ("append", BASE, ("hidden_size",), 2**30),
    "inner width": ("append", BASE, ("intermediate_size",), 2**40),
    "head": ("append", BASE, ("head_dim",), 2**30),
    "layers": ("append", BASE, ("num_hidden_layers",), 10**9),
    "layers of qwen3": ("prompt", BASE, ("num_hidden_layers",), 10**9),
    "layers of gpt2": ("block", BASE, ("n_layer",), 10**9),
    "a little too many layers": ("append", BASE, ("num_hidden_layers",), 3),
    "too few layers": ("append", BASE, ("num_hidden_layers",), 1),
    "positions of gpt2": ("block", BASE, ("n_positions",), 10**9),
    "positions of gpt2 that overflow": ("block", BASE, ("n_positions",), 2**62),
    "labels": ("append", BASE, ("num_labels",), 10**9),
    "block": ("block", LOOP, ("loop", "block_size"), 1024),
    "block out of range": ("block", LOOP, ("loop", "block_size"), 10**12),
    "rank": ("append", LOOP, ("loop", "lora", "rank"), 1024),
    "decode rank": ("append", LOOP, ("loop", "lora", "decode_rank"), 1024),
    "iterations": ("append", LOOP, ("loop", "trained_iterations"), 64),
    "decoder width": ("append", LOOP, ("loop", "decoder", "latent_decoder", "hidden_size"), 8192),
    "decoder layers": ("append", LOOP, ("loop", "decoder", "latent_decoder", "layers"), 48),
    "adapter rank": ("append", ADAPTER, ("r",), 10**10),
    "adapter rank of one layer": ("append", ADAPTER, ("rank_pattern",), {"q_proj": 10**10}),
    "adapter rank of no kind": ("append", ADAPTER, ("rank_pattern",), [1]),
    "newer format": ("append", LOOP, ("format_version",), FORMAT_VERSION + 1),
    "much newer format": ("append", LOOP, ("format_version",), 10**4000),
}


@pytest.mark.parametrize("case", HUGE)
def test_wrong_size_allocates_nothing(case, folders):
    workspace, name, place, value = HUGE[case]
    folder = folders[workspace]
    content = json.loads(folder.files[name])
    assert place[0] in content or place[0] == "num_labels"
    put(content, place, value)
    assert damaged(folder, {name: dumped(content)})


def test_a_base_model_that_can_be_made_and_not_run_is_refused(folders):
    config = {**json.loads(folders["block"].files[BASE]), "n_head": -1}
    assert "does not run" in damaged(folders["block"], {BASE: dumped(config)})


def test_an_adapter_whose_rank_holds_no_values_is_refused(folders):
    # Of no numbers at all, and so of any rank, in a file of a few bytes.
    folder, path = folders["append"], "loops/loop_01/adapter"
    tensors = {k: torch.zeros(10**9, 0) for k in load(folder.files[f"{path}_model.safetensors"])}
    adapter = {**json.loads(folder.files[f"{path}_config.json"]), "r": 10**9}
    config = json.loads(folder.files[LOOP])
    config["loop"]["lora"]["rank"] = [1024, 3, 2]
    damage = {f"{path}_model.safetensors": save(tensors), f"{path}_config.json": dumped(adapter), LOOP: dumped(config)}
    assert damaged(folder, damage)
