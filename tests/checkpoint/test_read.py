import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slr_core.checkpoint.folder import BUNDLED_FOLDER, DEFAULT_CHECKPOINT, bundled_names, local_path
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.read import load_checkpoint, load_weights
from slr_core.checkpoint.write import base_state, save_checkpoint
from slr_core.errors import CheckpointError
from slr_core.generation.reference import generate
from slr_core.loop.lora import lora_layers
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.conftest import TEXT
from tests.checkpoint.edits import ADAPTER, ADAPTER_CONFIG, BASE_WEIGHTS, MODULES, first, rewrite, truncate


def states(made):
    settings = [LoopParams(max_iterations=5, criterion="fixed").resolve(made.config)] * 2
    with torch.inference_mode():
        return loop_until_exit(made, made.encode(*tiny.batch(tiny.PROMPTS[2:4])), settings).states


# -- names -----------------------------------------------------------------------------------------------


def test_folder_named_as_bundled_comes_first(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("prosqa") == local_path(None) == DEFAULT_CHECKPOINT
    assert {local_path(name) for name in bundled_names()} == set(BUNDLED_FOLDER.iterdir())
    assert local_path("") == Path()
    assert local_path("checkpoints/prosqa") == Path("checkpoints/prosqa")
    assert describe_model(LatentReasoner.from_pretrained("prosqa")) == describe_model(LatentReasoner.from_pretrained())
    shutil.copytree(good, tmp_path / "prosqa")
    assert describe_model(LatentReasoner.from_pretrained("prosqa")) == describe_model(
        LatentReasoner.from_pretrained(str(good))
    )
    assert local_path(None) == DEFAULT_CHECKPOINT


@pytest.mark.parametrize("name", ["{tmp}/nope", "./nope", "models/nope", "a/b/c"])
def test_mistyped_folder(name, tmp_path, monkeypatch):
    """It is reported at once, without the hub."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slr_core.checkpoint.hub.get_hf_file_metadata", None)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_checkpoint(LatentReasoner, name.format(tmp=tmp_path))


# -- saving and loading ----------------------------------------------------------------------------------


def test_adapter_configs_are_the_same_whoever_saves_them(tmp_path):
    made = tiny.reasoner(loop={"lora": {"rank": 2, "alpha": 4, "target_modules": ["v_proj", "q_proj", "o_proj"]}})
    assert all(isinstance(adapter.target_modules, set) for adapter in made.adapter_configs.values())
    save_checkpoint(made, tmp_path)
    for path in (tmp_path / "loops").glob("*/adapter_config.json"):
        assert json.loads(path.read_text())["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert states(load_checkpoint(LatentReasoner, tmp_path))[0].equal(states(made)[0])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(
    "loop",
    [
        {},
        {"timestep": {"kind": "sinusoidal", "combine": "concat"}, "projection": {"kind": "mlp"}},
        {"lora": {"kind": "shared"}, "residual": {"norm": True}, "projection": {"kind": "linear"}},
        {"lora": {"kind": "none"}, "timestep": {"kind": "none"}, "residual": {"source": "none"}},
    ],
    ids=["default", "mlp-concat", "shared-norm", "bare"],
)
def test_saving_and_loading_changes_nothing(kind, loop, tmp_path):
    made = tiny.reasoner(kind, loop, text=TEXT, decode=True)
    made.save_pretrained(str(tmp_path))
    loaded = LatentReasoner.from_pretrained(str(tmp_path))
    assert not loaded.training
    assert loaded.config == made.config.replace(slr_version=loaded.config.slr_version)
    assert loaded.config.slr_version
    mine, theirs = made.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key
    for a, b in zip(states(made), states(loaded), strict=True):
        assert torch.equal(a, b)
    requests = [tiny.request(made, prompt) for prompt in tiny.PROMPTS]
    again = [tiny.request(loaded, prompt) for prompt in tiny.PROMPTS]
    assert requests == again
    assert [r.token_ids for r in generate(made, requests)] == [r.token_ids for r in generate(loaded, again)]


def test_the_folder_is_as_designed(good):
    files = {str(path.relative_to(good)) for path in good.rglob("*") if path.is_file()}
    adapters = {f"loops/{name}" for name in ("loop_01", "loop_02", "loop_03", "decode")}
    assert files >= {"slr_config.json", "slr_modules.safetensors", "base/config.json", "base/model.safetensors"}
    assert files >= {"tokenizer.json", "tokenizer_config.json"}
    assert files >= {f"{a}/{file}" for a in adapters for file in ("adapter_config.json", "adapter_model.safetensors")}
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert json.loads((good / "slr_config.json").read_text())["base"] == "base"
    assert str(good.parent) not in "".join(path.read_text() for path in good.rglob("*.json"))


def test_saving_twice_gives_the_same_bytes(made, good, tmp_path):
    made.save_pretrained(str(tmp_path))
    for path in good.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.relative_to(good)).read_bytes(), path
    assert (good / "slr_config.json").read_text() == (tmp_path / "slr_config.json").read_text()


def test_saving_does_not_change_the_model(made, tmp_path):
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    trainable = {name for name, p in made.named_parameters() if p.requires_grad}
    made.save_pretrained(str(tmp_path))
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())
    assert {name for name, p in made.named_parameters() if p.requires_grad} == trainable


def test_saving_over_an_old_checkpoint_leaves_nothing_of_it(folder):
    fresh = tiny.reasoner(loop={"lora": {"kind": "none"}})
    fresh.save_pretrained(str(folder))
    loaded = LatentReasoner.from_pretrained(str(folder))
    assert loaded.adapters.names == set()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_load_into_a_model_of_the_same_shape(kind, tmp_path):
    source, target = tiny.reasoner(kind, seed=3), tiny.reasoner(kind)
    source.save_pretrained(str(tmp_path))
    load_weights(target, tmp_path)
    theirs = target.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in source.state_dict().items())


def test_weights_of_another_shape_are_refused(folder):
    with pytest.raises(CheckpointError, match="loop_01"):
        load_weights(tiny.reasoner(loop={"lora": {"rank": 4}}), folder)


def test_half_precision(good):
    loaded = load_checkpoint(LatentReasoner, good, dtype=torch.bfloat16)
    assert {p.dtype for name, p in loaded.base.named_parameters() if "lora" not in name} == {torch.bfloat16}
    results = generate(loaded, [tiny.request(loaded, prompt) for prompt in tiny.PROMPTS])
    assert all(result.exit_reason != "diverged" for result in results)


def test_a_path_may_be_a_path_or_a_string(good):
    assert load_checkpoint(LatentReasoner, good).config == load_checkpoint(LatentReasoner, str(good)).config


def test_sizes_are_described(made):
    sizes = describe_model(made)
    lora = sum(p.numel() for name, p in made.named_parameters() if "lora_" in name)
    own = sum(p.numel() for name, p in made.named_parameters() if not name.startswith("base."))
    plain = sum(p.numel() for p in tiny.base().parameters())
    assert (sizes.base_parameters, sizes.adapter_parameters, sizes.module_parameters) == (plain, lora, own)
    assert sizes.added_parameters == lora + own
    assert sizes.added_share == pytest.approx((lora + own) / plain)
    assert (sizes.architecture, sizes.vocabulary) == ("LlamaForCausalLM", len(tiny.WORDS))


# -- one error for each way to be wrong ------------------------------------------------------------------


def without_first(tensors):
    return {key: x for key, x in tensors.items() if key != min(tensors)}


def config(folder, **changes):
    tiny.edit_json(folder / "slr_config.json", **changes)


def adapter(folder, **changes):
    tiny.edit_json(folder / "loops/loop_02/adapter_config.json", **changes)


def nan(x):
    return torch.full_like(x, float("nan"))


def one_inf(x):
    x = x.clone()
    x.view(-1)[-1] = float("inf")
    return x


def longer(x):
    return torch.cat([x, x])


# What is done to the folder, and what the message must name.
BROKEN = {
    "no-config": (lambda f: (f / "slr_config.json").unlink(), "slr_config.json"),
    "config-not-json": (lambda f: (f / "slr_config.json").write_text("{"), "slr_config.json"),
    "config-empty": (lambda f: (f / "slr_config.json").write_text(""), "slr_config.json"),
    "config-binary": (lambda f: (f / "slr_config.json").write_bytes(b"\xff\xfe\x00"), "slr_config.json"),
    "config-a-list": (lambda f: (f / "slr_config.json").write_text("[1]"), "slr_config.json"),
    "config-null": (lambda f: (f / "slr_config.json").write_text("null"), "slr_config.json"),
    "config-deep": (lambda f: (f / "slr_config.json").write_text("[" * 10**5), "slr_config.json"),
    "config-a-folder": (
        lambda f: ((f / "slr_config.json").unlink(), (f / "slr_config.json").mkdir()),
        "slr_config.json",
    ),
    "config-unknown-field": (lambda f: config(f, speed=1), "speed"),
    "config-absurd": (lambda f: config(f, loop={"max_iterations": 10**9}), "loop.max_iterations"),
    "config-nan": (lambda f: config(f, loop={"lora": {"alpha": float("nan")}}), "slr_config.json"),
    "config-wrong-type": (lambda f: config(f, base=3), "base"),
    "newer-format": (lambda f: config(f, format_version=2), "upgrade"),
    "much-newer-format": (lambda f: config(f, format_version=10**30), "upgrade"),
    "format-a-string": (lambda f: config(f, format_version="2"), "format_version"),
    "base-missing": (lambda f: shutil.rmtree(f / "base"), "base"),
    "base-empty": (lambda f: [path.unlink() for path in (f / "base").iterdir()], "base"),
    "base-without-config": (lambda f: (f / "base/config.json").unlink(), "base"),
    "base-config-not-json": (lambda f: (f / "base/config.json").write_text("{"), "base"),
    "base-of-unknown-type": (lambda f: tiny.edit_json(f / "base/config.json", model_type="nonesuch"), "base"),
    "base-without-weights": (lambda f: (f / BASE_WEIGHTS).unlink(), "base"),
    "base-truncated": (lambda f: truncate(f / BASE_WEIGHTS), "base"),
    "base-lacks-a-tensor": (lambda f: rewrite(f / BASE_WEIGHTS, without_first), "base"),
    "base-of-another-shape": (lambda f: rewrite(f / BASE_WEIGHTS, lambda x: first(x, longer)), "base"),
    "base-not-finite": (lambda f: rewrite(f / BASE_WEIGHTS, lambda x: first(x, one_inf)), "base"),
    "base-of-whole-numbers": (lambda f: rewrite(f / BASE_WEIGHTS, lambda x: first(x, torch.Tensor.int)), "I32"),
    "base-holds-more": (lambda f: rewrite(f / BASE_WEIGHTS, lambda x: {**x, "more": torch.ones(1)}), "unexpected"),
    "base-in-eight-bits": (lambda f: tiny.edit_json(f / "base/config.json", dtype="float8_e4m3fn"), "base"),
    "base-with-an-adapter": (lambda f: shutil.copy(f / ADAPTER_CONFIG, f / "base"), "adapter of its own"),
    "base-of-no-positions": (lambda f: tiny.edit_json(f / "base/config.json", max_position_embeddings=0), "position"),
    "base-of-another-size": (lambda f: tiny.edit_json(f / "base/config.json", hidden_size=16), "base"),
    "base-absolute": (lambda f: move_base(f, str(f.parent / "out")), "base must be"),
    "base-escapes": (lambda f: move_base(f, "../out"), "base must be"),
    "base-escapes-further-down": (lambda f: move_base(f, "loops/../../out"), "base must be"),
    "base-elsewhere": (lambda f: config(f, base="some/where"), "some/where"),
    "base-no-name": (lambda f: config(f, base=""), "base"),
    "base-a-link-out": (lambda f: (move_base(f, "base"), os.symlink(f.parent / "out", f / "base")), "base"),
    "adapter-missing": (lambda f: shutil.rmtree(f / "loops/loop_02"), "loop_02"),
    "adapters-missing": (lambda f: shutil.rmtree(f / "loops"), "loop_01"),
    "adapter-without-weights": (lambda f: (f / ADAPTER).unlink(), "loop_02"),
    "adapter-without-config": (lambda f: (f / ADAPTER_CONFIG).unlink(), "loop_02"),
    "adapter-config-not-json": (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "loop_02"),
    "adapter-config-a-list": (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), "loop_02"),
    "adapter-config-empty": (lambda f: (f / ADAPTER_CONFIG).write_text("{}"), "loop_02"),
    "adapter-config-binary": (lambda f: (f / ADAPTER_CONFIG).write_bytes(b"\xff\xfe\x00"), "loop_02"),
    "adapter-of-another-method": (lambda f: adapter(f, peft_type="IA3"), "loop_02"),
    "adapter-of-no-method": (lambda f: adapter(f, peft_type="NONESUCH"), "loop_02"),
    "adapter-rank-not-a-number": (lambda f: adapter(f, r="eight"), "loop_02"),
    "adapter-rank-negative": (lambda f: adapter(f, r=-1), "loop_02"),
    "adapter-rank-null": (lambda f: adapter(f, r=None), "loop_02"),
    "adapter-alpha-not-a-number": (lambda f: adapter(f, lora_alpha="x"), "loop_02"),
    "adapter-targets-missing-layers": (lambda f: adapter(f, target_modules=["nonesuch"]), "loop_02"),
    "adapter-targets-not-a-list": (lambda f: adapter(f, target_modules=7), "loop_02"),
    "adapter-targets-null": (lambda f: adapter(f, target_modules=None), "loop_02"),
    "adapter-of-a-newer-peft": (lambda f: adapter(f, shiny=True), "shiny"),
    "adapter-dora": (lambda f: adapter(f, use_dora=True), "use_dora"),
    "adapter-modules-to-save": (lambda f: adapter(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "adapter-on-the-head": (lambda f: adapter(f, target_modules=["lm_head"]), "loop_02"),
    "adapter-on-the-embeddings": (lambda f: adapter(f, target_modules=["embed_tokens"]), "loop_02"),
    "adapter-of-another-rank": (lambda f: adapter(f, r=7), "loop_02"),
    "adapter-truncated": (lambda f: truncate(f / ADAPTER), "loop_02"),
    "adapter-not-safetensors": (lambda f: (f / ADAPTER).write_bytes(b"weights"), "loop_02"),
    "adapter-empty": (lambda f: (f / ADAPTER).write_bytes(b""), "loop_02"),
    "adapter-lacks-a-tensor": (lambda f: rewrite(f / ADAPTER, without_first), "missing"),
    "adapter-unknown-tensor": (lambda f: rewrite(f / ADAPTER, lambda x: {**x, "more": torch.ones(1)}), "unknown"),
    "adapter-of-another-shape": (lambda f: rewrite(f / ADAPTER, lambda x: first(x, longer)), "shape"),
    "adapter-not-finite": (lambda f: rewrite(f / ADAPTER, lambda x: first(x, nan)), "not finite"),
    "decode-adapter-truncated": (lambda f: truncate(f / "loops/decode/adapter_model.safetensors"), "decode"),
    "decode-adapter-empty": (lambda f: [path.unlink() for path in (f / "loops/decode").iterdir()], "decode"),
    "modules-missing": (lambda f: (f / MODULES).unlink(), MODULES),
    "modules-truncated": (lambda f: truncate(f / MODULES), MODULES),
    "modules-lack-a-tensor": (lambda f: rewrite(f / MODULES, without_first), "missing"),
    "modules-unknown-tensor": (lambda f: rewrite(f / MODULES, lambda x: {**x, "more": torch.ones(1)}), "unknown"),
    "modules-of-another-shape": (lambda f: rewrite(f / MODULES, lambda x: first(x, longer)), "shape"),
    "modules-not-finite": (lambda f: rewrite(f / MODULES, lambda x: first(x, one_inf)), "not finite"),
    "tokenizer-missing": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "tokenizer"),
    "tokenizer-not-json": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer-adds-unknown-ids": (lambda f: stray_ids(f), "tokenizer"),
    "tokenizer-of-another-model": (lambda f: larger_tokenizer(f), "tokenizer"),
}


def move_base(folder, name):
    (folder / "base").rename(folder.parent / "out")
    config(folder, base=name)


def larger_tokenizer(folder):
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {f"more{i}": len(tiny.WORDS) + i for i in range(50)}
    path.write_text(json.dumps(data))


def stray_ids(folder):
    """A tokenizer that begins every text with a token that its vocabulary does not have."""
    path = folder / "tokenizer.json"
    begin = {"id": "<b>", "ids": [10**6], "tokens": ["<b>"]}
    single = [{"SpecialToken": {"id": "<b>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<b>": begin}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": template}))


def test_fields_of_a_newer_peft_are_harmless_while_they_are_off(folder, good):
    adapter(folder, shiny=False, shinier=None)
    expected, actual = (LatentReasoner.from_pretrained(str(f)).state_dict() for f in (good, folder))
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


def test_save_over_the_loaded_folder(folder, made):
    loaded = LatentReasoner.from_pretrained(str(folder))
    loaded.save_pretrained(str(folder))
    again = LatentReasoner.from_pretrained(str(folder)).state_dict()
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
        assert torch.equal(tensor, again[key])


def test_files_may_change_once_they_are_loaded(folder, made):
    loaded = LatentReasoner.from_pretrained(str(folder))
    if (maps := Path("/proc/self/maps")).exists():
        assert str(folder) not in maps.read_text(), "truncating a mapped file would end the process"
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-path.stat().st_size // 2, 2)
            file.write(b"\x3f" * 64)
    request = tiny.request(made, tiny.PROMPTS[1])
    assert generate(loaded, [request])[0].token_ids == generate(made, [request])[0].token_ids
    for key, tensor in base_state(made.base).items():
        assert torch.equal(tensor, base_state(loaded.base)[key])


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_error(case, folder):
    breaking, named = BROKEN[case]
    breaking(folder)
    with pytest.raises(CheckpointError) as caught:
        LatentReasoner.from_pretrained(str(folder))
    message = str(caught.value)
    assert named in message
    assert str(folder) in message
    assert len(message) < 1000


@pytest.mark.parametrize("depth", range(100, 1100, 100))
def test_a_deeply_nested_config_is_a_checkpoint_error(depth, folder):
    (folder / "slr_config.json").write_text('{"loop":' * depth + "1" + "}" * depth)
    with pytest.raises(CheckpointError, match=r"slr_config\.json"):
        LatentReasoner.from_pretrained(str(folder))


@pytest.mark.parametrize("path", ["nowhere", "no/where", "/no/where/at/all", "a b", "../up", "x" * 300, "C:\\models"])
def test_a_folder_that_is_not_there_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        LatentReasoner.from_pretrained(path)
    assert path in str(caught.value)


def test_a_file_is_not_a_folder(folder):
    path = folder / "slr_config.json"
    with pytest.raises(CheckpointError) as caught:
        LatentReasoner.from_pretrained(str(path))
    assert str(path) in str(caught.value)


def test_base_in_working_directory_is_ignored(folder, monkeypatch):
    # transformers reads a relative name from the working directory first.
    (folder / "base").rename(folder.parent / "elsewhere")
    config(folder, base="elsewhere")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(CheckpointError, match="elsewhere"):
        LatentReasoner.from_pretrained(str(folder))


@pytest.mark.parametrize(
    "change", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"layer_replication": [[0, 2], [0, 2]]}]
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_cannot_rewrite_the_base_model(change, folder, good):
    adapter(folder, **change)
    try:
        loaded = LatentReasoner.from_pretrained(str(folder))
    except CheckpointError:
        return  # refusing is as good
    expected = LatentReasoner.from_pretrained(str(good)).state_dict()
    actual = loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_adapter_initializations(start, folder, good, tmp_path):
    adapter(folder, init_lora_weights=start, eva_config={"rho": 2.0} if start == "eva" else None)
    loaded = LatentReasoner.from_pretrained(str(folder))
    expected = LatentReasoner.from_pretrained(str(good)).state_dict()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.items())
    loaded.save_pretrained(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / ADAPTER_CONFIG).read_text())["init_lora_weights"] == start


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "nonesuch", "", 3, None, [], {}]
)
def test_an_adapter_that_changed_the_base_is_refused_by_name(start, folder):
    adapter(folder, init_lora_weights=start)
    with pytest.raises(
        CheckpointError, match=rf"loop_02/adapter_config\.json: init_lora_weights {re.escape(repr(start))}"
    ):
        LatentReasoner.from_pretrained(str(folder))


def test_patterns_of_an_adapter(folder, good):
    """They load, are kept as written, and those without a match are named."""
    path = folder / "loops/decode/adapter_config.json"
    target, data = r".*\.(q|down)_proj", json.loads(path.read_text())
    tiny.edit_json(path, target_modules=target, alpha_pattern={"layers.*q_proj": 6}, rank_pattern={"q_proj": data["r"]})
    loaded = LatentReasoner.from_pretrained(str(folder))
    expected = LatentReasoner.from_pretrained(str(good)).state_dict()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.items())
    loaded.save_pretrained(str(folder))
    assert json.loads(path.read_text())["target_modules"] == target
    for field, value in {
        "target_modules": ".*x_proj",
        "rank_pattern": {"x_proj": 1},
        "alpha_pattern": {"x": 1},
    }.items():
        path.write_text(json.dumps({**data, field: value}))
        with pytest.raises(CheckpointError, match=f"{field}.*matches no"):
            LatentReasoner.from_pretrained(str(folder))


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "exclude_modules"])
def test_a_pattern_does_not_take_exponential_time(field, folder):
    pattern = "((((?:[a-z._0-9]+)+)+)+)+!"
    adapter(folder, **{field: {pattern: 3} if field == "rank_pattern" else pattern})
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"loop_02.*{field}"):
        LatentReasoner.from_pretrained(str(folder))
    assert time.perf_counter() - started < 10


# -- nothing runs code; pickles that would: test_checkpoint_fuzz.py -------------------------------------


@pytest.mark.parametrize(
    ("safe", "pickled"),
    [(ADAPTER, "loops/loop_02/adapter_model.bin"), (BASE_WEIGHTS, "base/pytorch_model.bin")],
)
def test_a_pickle_is_not_read_even_if_it_is_harmless(safe, pickled, folder):
    torch.save(load_file(folder / safe), folder / pickled)
    (folder / safe).unlink()
    with pytest.raises(CheckpointError):
        LatentReasoner.from_pretrained(str(folder))


def test_code_in_the_base_folder_is_not_run(folder):
    mark = folder.parent / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Model: pass\nclass Config: pass\n"
    (folder / "base/modeling.py").write_text(code)
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    tiny.edit_json(folder / "base/config.json", model_type="nonesuch", auto_map=auto_map)
    with pytest.raises(CheckpointError, match="base"):
        LatentReasoner.from_pretrained(str(folder))
    assert not mark.exists()


def test_saving_into_a_new_folder_makes_it(tmp_path, made):
    save_checkpoint(made, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "slr_config.json").is_file()


def test_loads_of_several_threads_leave_initializers_alone(tmp_path):
    """transformers replaces them while it loads; if loads overlapped, later weights would not be initialized."""
    tiny.reasoner().save_pretrained(str(tmp_path / "made"))
    before = torch.nn.init.kaiming_uniform_
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(LatentReasoner.from_pretrained, [str(tmp_path / "made")] * 12))
    finally:
        sys.setswitchinterval(interval)
    assert torch.nn.init.kaiming_uniform_ is before


# -- idle adapters ---------------------------------------------------------------------------------------


def test_idle_adapters_are_left_out(tmp_path):
    """Adapters that add nothing take no memory where a model only answers; names and states stay."""
    made = tiny.reasoner("llama", {"trained_iterations": 3, "max_iterations": 3})
    with torch.no_grad():
        for layer in lora_layers(made.base).values():
            layer.lora_B["loop_02"].weight.zero_()
    save_checkpoint(made, tmp_path / "one")
    whole = load_checkpoint(LatentReasoner, tmp_path / "one")
    served = load_checkpoint(LatentReasoner, tmp_path / "one", idle_adapters=False)
    assert served.adapters.names == whole.adapters.names == {"loop_01", "loop_02", "loop_03"}
    assert {name for layer in lora_layers(served.base).values() for name in layer.lora_A} == {"loop_01", "loop_03"}
    torch.testing.assert_close(states(served), states(whole))
    with torch.no_grad():
        for layer in lora_layers(made.base).values():
            for up in layer.lora_B.values():
                up.weight.zero_()
    save_checkpoint(made, tmp_path / "all")
    served = load_checkpoint(LatentReasoner, tmp_path / "all", idle_adapters=False)
    assert lora_layers(served.base) == {}
    assert describe_model(served) == describe_model(made)
    assert served.adapters.names == whole.adapters.names
    torch.testing.assert_close(states(served), states(load_checkpoint(LatentReasoner, tmp_path / "all")))
