"""Files of a checkpoint: shards, values that do not fit, and files that must not be opened."""

import json
import os
import re
import struct
import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from slr_core.checkpoint import validate
from slr_core.checkpoint.pretrained import load_model_and_tokenizer
from slr_core.checkpoint.read import load_checkpoint, load_weights
from slr_core.errors import CheckpointError
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.edits import ADAPTER, ADAPTER_CONFIG, BASE_WEIGHTS, MODULES, first, rewrite, truncate

# -- code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "flash_attention_2"},
        {"experts_implementation": "deepgemm"},
    ],
)
def test_code_of_the_hub_is_refused(named, folder):
    """transformers would load compiled code, if the package `kernels` is installed."""
    tiny.edit_json(folder / "base/config.json", **named)
    (value,) = named.values()
    with pytest.raises(CheckpointError, match=f"'{value}' is code outside of the checkpoint"):
        LatentReasoner.from_pretrained(str(folder))
    with pytest.raises(CheckpointError, match=f"'{value}' is code outside of the checkpoint"):
        load_model_and_tokenizer(str(folder / "base"))


# -- shards ----------------------------------------------------------------------------------------------

INDEX = "base/model.safetensors.index.json"


def shard(folder, parts=3):
    """Spread the base's weights over files with an index, as transformers does for large models."""
    tensors = load_file(folder / BASE_WEIGHTS)
    (folder / BASE_WEIGHTS).unlink()
    names = {key: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        part = {key: x for key, x in tensors.items() if names[key] == name}
        save_file(part, folder / "base" / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharded_weights(kind, tmp_path):
    source, target = tiny.reasoner(kind, seed=3), tiny.reasoner(kind)
    source.save_pretrained(str(tmp_path))
    shard(tmp_path)
    load_weights(target, tmp_path)
    loaded = LatentReasoner.from_pretrained(str(tmp_path)).state_dict()
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[key])
        assert torch.equal(tensor, loaded[key])


def index(folder, **changes):
    tiny.edit_json(folder / INDEX, **changes)


BROKEN_SHARDS = {
    "no-map": (lambda f, names: index(f, weight_map=None), "index.json"),
    "not-names": (lambda f, names: index(f, weight_map=dict.fromkeys(names, 1)), "index.json"),
    "escapes": (lambda f, names: index(f, weight_map=dict.fromkeys(names, "../out.safetensors")), "beside its index"),
    "a-pickle": (lambda f, names: index(f, weight_map=dict.fromkeys(names, "pytorch_model.bin")), "beside its index"),
    "missing-shard": (lambda f, names: (f / "base" / min(names.values())).unlink(), "is missing"),
    "moved": (lambda f, names: index(f, weight_map=dict.fromkeys(names, min(names.values()))), "disagree|missing"),
    "truncated": (lambda f, names: truncate(f / "base" / min(names.values())), "model-00001"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards(case, folder, made):
    breaking, named = BROKEN_SHARDS[case]
    breaking(folder, shard(folder))
    with pytest.raises(CheckpointError, match=named):
        load_weights(tiny.twin(made), folder)
    with pytest.raises(CheckpointError, match="base"):
        LatentReasoner.from_pretrained(str(folder))


def test_saving_over_other_weights(folder, made, monkeypatch):
    """Shards over one file and one file over shards: nothing of the earlier save is left to be read."""
    shard(folder)
    made.save_pretrained(str(folder))
    assert [path.name for path in sorted((folder / "base").glob("model*"))] == ["model.safetensors"]
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", partialmethod(PreTrainedModel.save_pretrained, max_shard_size="20KB")
    )
    made.save_pretrained(str(folder))
    assert (folder / INDEX).is_file()
    assert not (folder / BASE_WEIGHTS).exists()
    loaded = LatentReasoner.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in made.state_dict().items())


# -- values that do not fit ------------------------------------------------------------------------------


def large(x):
    x = x.clone()
    x.view(-1)[0] = 1e6
    return x


@pytest.mark.parametrize("name", [BASE_WEIGHTS, ADAPTER, MODULES])
def test_weights_that_overflow_in_the_dtype_of_the_base(name, folder):
    rewrite(folder / name, lambda tensors: first(tensors, large))
    key = min(key for key, x in load_file(folder / name).items() if x.is_floating_point())
    load_checkpoint(LatentReasoner, folder)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key.removeprefix('base_model.model.'))} .*torch.float16"):
        load_checkpoint(LatentReasoner, folder, dtype=torch.float16)


def test_weights_that_overflow_on_resume(folder, made):
    target = tiny.twin(made)
    target.base.to(torch.float16)
    rewrite(folder / BASE_WEIGHTS, lambda tensors: first(tensors, large))
    before = {key: x.clone() for key, x in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"too large for .*float16"):
        load_weights(target, folder)
    assert all(torch.equal(x, before[key]) for key, x in target.state_dict().items())


@pytest.mark.parametrize("stored", ["other", "equal"])
def test_a_tied_head_that_is_stored_too(stored, tmp_path):
    made = tiny.reasoner("qwen3")
    made.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / BASE_WEIGHTS)
    assert json.loads((tmp_path / "base/config.json").read_text())["tie_word_embeddings"]
    head = tensors["model.embed_tokens.weight"] * (2 if stored == "other" else 1)
    save_file({**tensors, "lm_head.weight": head}, tmp_path / BASE_WEIGHTS, metadata={"format": "pt"})
    if stored == "equal":
        load_weights(made, tmp_path)
        assert LatentReasoner.from_pretrained(str(tmp_path)).state_dict().keys() == made.state_dict().keys()
        return
    for load in (lambda: LatentReasoner.from_pretrained(str(tmp_path)), lambda: load_weights(made, tmp_path)):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight .*model\.embed_tokens\.weight.*different values"):
            load()


# -- files that would never end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("slr_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", MODULES, ADAPTER),
        *(ADAPTER_CONFIG, BASE_WEIGHTS, "base/config.json", "base/generation_config.json", INDEX),
        *("additional_chat_templates/x.jinja", "base/model-00001-of-00001.safetensors"),
    ],
)
def test_a_pipe_is_not_opened(name, folder):
    path = folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        LatentReasoner.from_pretrained(str(folder))


@pytest.mark.parametrize("name", [BASE_WEIGHTS, ADAPTER, MODULES])
def test_a_pipe_is_not_opened_on_resume(name, folder, made):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=re.escape(Path(name).name)):
        load_weights(tiny.twin(made), folder)


def test_devices_and_broken_links(folder):
    (folder / "README.md").symlink_to("nowhere")
    LatentReasoner.from_pretrained(str(folder))
    (folder / "vocab.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"vocab\.json: not a regular file"):
        LatentReasoner.from_pretrained(str(folder))


def sparse(path, size):
    with path.open("ab") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", ["slr_config.json", ADAPTER_CONFIG, "base/config.json", "tokenizer.json", "vocab.txt"])
def test_a_huge_file_is_refused_before_it_is_read(name, folder):
    sparse(folder / name, 2**40)
    with pytest.raises(CheckpointError, match=rf"{re.escape(Path(name).name)}: it has more than \d+ bytes"):
        LatentReasoner.from_pretrained(str(folder))


def write_header(path, header, length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


@pytest.mark.parametrize("name", [BASE_WEIGHTS, ADAPTER, MODULES])
def test_a_header_of_a_million_tensors_is_refused_at_once(name, folder):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i}":{entry}' for i in range(10**6)) + "}"
    write_header(folder / name, header.encode())
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"{Path(name).name}: its header has more than"):
        LatentReasoner.from_pretrained(str(folder))
    assert time.perf_counter() - started < 5


def test_tensors_of_many_files_are_counted_together(folder, monkeypatch):
    monkeypatch.setattr(validate, "MAX_TENSORS", 20)
    shard(folder, 3)
    with pytest.raises(CheckpointError, match="more than 20 tensors"):
        LatentReasoner.from_pretrained(str(folder))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
@pytest.mark.parametrize("size", [0, 2**36])
def test_a_header_of_absurd_length(length, size, folder):
    write_header(folder / ADAPTER, b"{}", length)
    sparse(folder / ADAPTER, max(size, 10))
    with pytest.raises(CheckpointError, match="header"):
        LatentReasoner.from_pretrained(str(folder))
