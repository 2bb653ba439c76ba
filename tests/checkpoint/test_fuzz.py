"""Whatever bytes, files or tensors a checkpoint folder holds, it loads and runs, or is refused in one clear line."""

import itertools
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.checkpoint.damage import MADE, cases, checkpoints, damaged, named, refusal, workspaces


@pytest.fixture(scope="module")
def folders():
    with checkpoints() as made:
        yield made


# -- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", MADE)
def test_an_undamaged_folder_loads(workspace, folders):
    folder = folders[workspace]
    assert not refusal(folder.path)
    parts = {"loops/decode/adapter_model.safetensors", "base/model.safetensors", "slr_modules.safetensors"}
    assert parts <= folder.files.keys()
    modules = load(folder.files["slr_modules.safetensors"])
    assert {key.split(".")[0] for key in modules} >= {"project", "timestep", "residual", "halting", "decoder"}


@cases(15)
@given(data=st.data(), workspace=workspaces)
def test_truncated(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    content = folder.files[name]
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 400)))
    assert damaged(folder, {name: content[:at]}) or not name.endswith(".safetensors")


@cases(30)
@given(data=st.data(), workspace=workspaces)
def test_flipped_bits(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    content = bytearray(folder.files[name])
    # Half of them in the header, where a safetensors file says what it holds.
    places = st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 1000))
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    damaged(folder, {name: bytes(content)})


@cases(10)
@given(data=st.data(), workspace=workspaces)
def test_other_bytes_altogether(folders, data, workspace):
    folder = folders[workspace]
    name = data.draw(named(folder))
    header = st.binary(max_size=60).map(lambda text: struct.pack("<Q", len(text)) + text)
    damaged(
        folder, {name: data.draw(st.binary(max_size=60) | header | st.sampled_from([b"{}", b"[]", b"null", b'"x"']))}
    )


# -- files of something else -----------------------------------------------------------------------------


@cases(15)
@given(data=st.data(), workspace=workspaces, other=workspaces)
def test_swapped_files(folders, data, workspace, other):
    folder, source = folders[workspace], folders[other]
    name = data.draw(named(folder))
    ending = data.draw(st.sampled_from([name.rsplit(".", 1)[-1], ""]))
    damaged(folder, {name: source.files[data.draw(named(source, ending))]})


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
    assert message in damaged(folder, damage)


@pytest.mark.parametrize("part", ["base/", "base/model.safetensors", "slr_modules.safetensors", "loops/"])
@pytest.mark.parametrize(("workspace", "other"), [("append", "block"), ("block", "prompt")])
def test_a_part_of_another_checkpoint_is_refused(part, workspace, other, folders):
    folder, source = folders[workspace], folders[other]
    mine, theirs = ({k for k in x.files if k.startswith(part)} for x in (folder, source))
    damage = dict.fromkeys(mine, None) | {name: source.files[name] for name in theirs}
    assert damaged(folder, damage)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(("workspace", "legacy"), list(zip(MADE, itertools.cycle([False, True]))))
def test_a_pickle_in_place_of_any_file_is_never_unpickled(workspace, legacy, folders, tmp_path):
    folder, mark = folders[workspace], tmp_path / "mark"
    torch.save({"weights": Bomb(mark)}, tmp_path / "bomb", _use_new_zipfile_serialization=not legacy)
    bomb = (tmp_path / "bomb").read_bytes()
    for name in folder.files:
        assert damaged(folder, {name: bomb}) or name in OPTIONAL
        pickled = name.replace("adapter_model.safetensors", "adapter_model.bin")
        pickled = pickled.replace("base/model.safetensors", "base/pytorch_model.bin").replace(".safetensors", ".bin")
        if pickled != name:
            assert damaged(folder, {name: None, pickled: bomb})
    assert not mark.exists()
    torch.load(tmp_path / "bomb", weights_only=False)
    assert mark.exists()  # it would have gone off


OPTIONAL = {"base/generation_config.json", "loops/README.md", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("workspace", MADE)
def test_only_optional_files_may_be_missing(workspace, folders):
    folder = folders[workspace]
    refused = {name for name in folder.files if damaged(folder, {name: None})}
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


@cases(20)
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
    refused = damaged(folder, {name: save({k: y.clone() for k, y in tensors.items()}, metadata={"format": "pt"})})
    assert refused or (how == "dtype" and tensors[key].dtype == torch.float64), (how, name, key)
