"""Whatever happened to a checkpoint folder, it loads and runs, or is refused in one clear line.

``SLR_FUZZ=5000`` runs that many random cases of each kind instead of the few fixed ones.
"""

import json
import math
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from slr_core.config import FORMAT_VERSION
from slr_core.errors import CheckpointError, SLRError
from slr_core.generation import generate
from slr_core.model import LatentReasoner
from tests import tiny

WIDE = int(os.environ.get("SLR_FUZZ", "0"))
SLACK = 2 * 2**30
"""Bytes of address space that loading a checkpoint of some hundred kilobytes may take."""

ALL_PARTS = {
    "block_size": 3,
    "lora": {"rank": [2, 3, 2], "decode_rank": 3},
    "timestep": {"kind": "sinusoidal", "combine": "concat", "noise_level": True},
    "projection": {"kind": "mlp"},
    "residual": {"norm": True},
    "halting_head": True,
    "decoder": {"answers": "latent_decoder", "latent_decoder": {"hidden_size": 8, "layers": 1, "heads": 2}},
}
TEXT = {"prompt_prefix": "w1 ", "answer_prefix": "w2", "stop": ["w36"], "stop_token_ids": [7], "max_new_tokens": 5}
MADE = {
    "append": ("llama", {"workspace": "append"}),
    "block": ("gpt2", {"workspace": "block"}),
    "prompt": ("qwen3", {"workspace": "prompt"}),
}


def cases(count: int):
    """So many examples: always the same ones, or as many random ones as were asked for."""
    return settings(max_examples=WIDE or count, derandomize=not WIDE)


class Folder(NamedTuple):
    """A checkpoint that can be damaged and mended."""

    path: Path
    files: dict[str, bytes]

    def write(self, name: str, content: bytes | None) -> None:
        """Replace a file, or take it away."""
        (self.path / name).unlink(missing_ok=True)
        if content is not None:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(content)


def saved(workspace: str) -> Folder:
    kind, loop = MADE[workspace]
    path = Path(tempfile.mkdtemp(prefix="slr-fuzz-")) / "checkpoint"
    tiny.reasoner(kind, {**ALL_PARTS, **loop}, text=TEXT).save_pretrained(str(path))
    files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return Folder(path, files)


@pytest.fixture(scope="module")
def folders():
    made = {workspace: saved(workspace) for workspace in MADE}
    yield made
    for folder in made.values():
        shutil.rmtree(folder.path.parent)


@contextmanager
def bounded_memory():
    """Whatever asks for gigabytes fails, rather than being lent pages that nobody touches."""
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SLACK, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def loads(path: Path) -> bool:
    """Whether a folder loads; one that does must also run, and one that does not be refused as promised."""
    with bounded_memory(), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = LatentReasoner.from_pretrained(str(path))
        except CheckpointError as error:
            message = str(error)
            assert str(path) in message
            assert message.isprintable(), message
            assert len(message) < 1000
            assert not re.search("alloc|memory", message, re.IGNORECASE), message
            return False
        with suppress(SLRError):  # such as a model of too few positions
            generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 2}, max_new_tokens=2)])
    return True


def check(folder: Folder, damage: dict[str, bytes | None]) -> bool:
    """Damage files of a folder, see whether it loads, and mend it."""
    try:
        for name, content in damage.items():
            folder.write(name, content)
        return loads(folder.path)
    finally:
        for name in damage:
            folder.write(name, folder.files.get(name))


def named(folder: Folder, suffix: str = "") -> st.SearchStrategy[str]:
    return st.sampled_from([name for name in folder.files if name.endswith(suffix)])


workspaces = st.sampled_from(list(MADE))


# -- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", MADE)
def test_an_undamaged_folder_loads(workspace, folders):
    folder = folders[workspace]
    assert loads(folder.path)
    parts = {"loops/decode/adapter_model.safetensors", "base/model.safetensors", "slr_modules.safetensors"}
    assert parts <= folder.files.keys()
    modules = load(folder.files["slr_modules.safetensors"])
    assert {key.split(".")[0] for key in modules} >= {"project", "timestep", "residual", "halting", "decoder"}


@cases(30)
@given(data=st.data(), workspace=workspaces)
def test_truncated(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    content = folder.files[name]
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 400)))
    loaded = check(folder, {name: content[:at]})
    assert not (loaded and name.endswith(".safetensors"))


@cases(60)
@given(data=st.data(), workspace=workspaces)
def test_flipped_bits(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    content = bytearray(folder.files[name])
    # Half of them in the header, where a safetensors file says what it holds.
    places = st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 1000))
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    check(folder, {name: bytes(content)})


@cases(15)
@given(data=st.data(), workspace=workspaces)
def test_other_bytes_altogether(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    header = st.binary(max_size=60).map(lambda text: struct.pack("<Q", len(text)) + text)
    check(folder, {name: data.draw(st.binary(max_size=60) | header | st.sampled_from([b"{}", b"[]", b"null", b'"x"']))})


# -- files of something else -----------------------------------------------------------------------------


@cases(30)
@given(data=st.data(), workspace=workspaces, other=workspaces)
def test_swapped_files(folders, data, workspace, other):
    folder, source = folders[workspace], folders[other]
    name = data.draw(named(folder))
    ending = data.draw(st.sampled_from([name.rsplit(".", 1)[-1], ""]))
    check(folder, {name: source.files[data.draw(named(source, ending))]})


SWAPS = {
    "adapters-of-two-ranks": ("append", {"loops/loop_01": "loops/loop_02"}, "rank"),
    "an-adapter-in-place-of-decode": ("block", {"loops/decode": "loops/loop_01"}, "rank"),
    "weights-of-two-ranks": ("append", {"loops/loop_01/adapter_model": "loops/loop_02/adapter_model"}, "loop_01"),
    "config-of-another-rank": ("prompt", {"loops/loop_02/adapter_config": "loops/loop_01/adapter_config"}, "loop_02"),
    "base-weights-as-modules": ("append", {"slr_modules": "base/model"}, "slr_modules.safetensors"),
    "modules-as-base-weights": ("append", {"base/model": "slr_modules"}, "base"),
    "modules-as-an-adapter": ("append", {"loops/loop_03/adapter_model": "slr_modules"}, "loop_03"),
    "adapter-config-as-config": ("append", {"slr_config": "loops/loop_01/adapter_config"}, "slr_config.json"),
}


@pytest.mark.parametrize("case", SWAPS)
def test_a_swap_within_a_folder_is_refused_by_name(case, folders):
    workspace, swap, message = SWAPS[case]
    folder = folders[workspace]
    damage = {
        name: folder.files[name.replace(old, new)]
        for old, new in swap.items()
        for name in folder.files
        if name.startswith(old)
    }
    assert damage
    assert_refused(folder, damage, message)


@pytest.mark.parametrize("part", ["base/", "base/model.safetensors", "slr_modules.safetensors", "loops/"])
@pytest.mark.parametrize(("workspace", "other"), [("append", "block"), ("block", "prompt")])
def test_a_part_of_another_checkpoint_is_refused(part, workspace, other, folders):
    folder, source = folders[workspace], folders[other]
    mine, theirs = ({k for k in x.files if k.startswith(part)} for x in (folder, source))
    damage = dict.fromkeys(mine, None) | {name: source.files[name] for name in theirs}
    assert not check(folder, damage)


def assert_refused(folder: Folder, damage: dict[str, bytes | None], message: str) -> None:
    try:
        for name, content in damage.items():
            folder.write(name, content)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            LatentReasoner.from_pretrained(str(folder.path))
    finally:
        for name in damage:
            folder.write(name, folder.files.get(name))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("workspace", MADE)
def test_a_pickle_in_place_of_any_file_is_never_unpickled(workspace, legacy, folders, tmp_path):
    folder, mark = folders[workspace], tmp_path / "mark"
    torch.save({"weights": Bomb(mark)}, tmp_path / "bomb", _use_new_zipfile_serialization=not legacy)
    bomb = (tmp_path / "bomb").read_bytes()
    for name in folder.files:
        assert not check(folder, {name: bomb}) or name in OPTIONAL
        pickled = name.replace("adapter_model.safetensors", "adapter_model.bin")
        pickled = pickled.replace("base/model.safetensors", "base/pytorch_model.bin").replace(".safetensors", ".bin")
        if pickled != name:
            assert not check(folder, {name: None, pickled: bomb})
    assert not mark.exists()


OPTIONAL = {"base/generation_config.json", "loops/README.md", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("workspace", MADE)
def test_only_optional_files_may_be_missing(workspace, folders):
    folder = folders[workspace]
    refused = {name for name in folder.files if not check(folder, {name: None})}
    assert {name for name in folder.files if not name.endswith("README.md")} - refused <= OPTIONAL


# -- tensors ---------------------------------------------------------------------------------------------

DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float64)


def reshaped(x):
    return st.sampled_from(
        [
            torch.cat([x, x]),
            x[:0],
            x[..., None],
            x.flatten(),
            x.reshape(()) if x.numel() == 1 else x.reshape(1, *x.shape),
            x.T.contiguous() if x.ndim == 2 else x[1:],
            torch.zeros(10**12, 0),
            torch.zeros(0, 10**12),
            torch.zeros(()),
            torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
        ]
    )


def spoiled(x):
    return st.sampled_from([float("nan"), float("inf"), -float("inf")]).map(lambda bad: torch.full_like(x, bad))


@cases(40)
@given(data=st.data(), workspace=workspaces)
def test_wrong_tensors(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder, ".safetensors"))
    tensors = load(folder.files[name])
    key = data.draw(st.sampled_from(sorted(tensors)))
    x = tensors.pop(key)
    how = data.draw(st.sampled_from(["gone", "renamed", "extra", "shape", "dtype", "values"]))
    match how:
        case "renamed":
            tensors[data.draw(st.text(min_size=1, max_size=50))] = x
        case "extra":
            tensors |= {key: x, data.draw(st.text(min_size=1, max_size=50)): torch.ones(2)}
        case "shape":
            tensors[key] = data.draw(reshaped(x).filter(lambda y: y.shape != x.shape))
        case "dtype":
            tensors[key] = x.to(data.draw(st.sampled_from(DTYPES)))
        case "values":
            tensors[key] = data.draw(spoiled(x))
    loaded = check(folder, {name: save({k: y.clone() for k, y in tensors.items()}, metadata={"format": "pt"})})
    assert not loaded or (how == "dtype" and tensors[key].dtype == torch.float64), (how, name, key)


# -- values ----------------------------------------------------------------------------------------------


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


@cases(150)
@given(data=st.data(), workspace=workspaces)
def test_absurd_values(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder, ".json"))
    content = json.loads(folder.files[name])
    known = list(places(content))
    place = data.draw(st.sampled_from(known) | st.sampled_from([(key,) for key in ADDED]))
    gone = place in known and data.draw(st.integers(0, 9)) == 0
    put(content, place, ... if gone else data.draw(st.sampled_from(ABSURD)))
    check(folder, {name: dumped(content)})


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
def test_a_size_that_the_files_do_not_have_is_refused_before_it_is_allocated(case, folders):
    workspace, name, place, value = HUGE[case]
    folder = folders[workspace]
    content = json.loads(folder.files[name])
    assert place[0] in content or place[0] == "num_labels"
    put(content, place, value)
    assert not check(folder, {name: dumped(content)})


def test_an_adapter_whose_rank_holds_no_values_is_refused(folders):
    # Of no numbers at all, and so of any rank, in a file of a few bytes.
    folder, path = folders["append"], "loops/loop_01/adapter"
    tensors = {k: torch.zeros(10**9, 0) for k in load(folder.files[f"{path}_model.safetensors"])}
    adapter = {**json.loads(folder.files[f"{path}_config.json"]), "r": 10**9}
    config = json.loads(folder.files[LOOP])
    config["loop"]["lora"]["rank"] = [1024, 3, 2]
    damage = {f"{path}_model.safetensors": save(tensors), f"{path}_config.json": dumped(adapter), LOOP: dumped(config)}
    assert not check(folder, damage)
