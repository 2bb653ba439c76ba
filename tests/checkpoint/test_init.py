"""``slr init`` from Python: a base model in, a checkpoint folder out."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.init import InitConfig, init_checkpoint
from slr_core.checkpoint.pretrained import PACKAGED, cache_folder, dequantized_folder
from slr_core.checkpoint.read import load_checkpoint
from slr_core.errors import CheckpointError, ConfigError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.gguf_file import write_gguf


def write_base(folder, kind="llama"):
    tiny.base(kind).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("init") / "plain")


def settings(tmp_path, text):
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    return path


def is_the_base(made, plain):
    """Whether a checkpoint without iterations writes what the base model does."""
    for prompt in tiny.PROMPTS[:3]:
        request = tiny.request(made, prompt, {"max_iterations": 0}, max_new_tokens=5)
        ids = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            expected = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=tiny.PAD
            )
        if list(generate(made, [request])[0].token_ids) != expected[0, ids.shape[1] :].tolist():
            return False
    return True


# Not Qwen2: transformers makes its tokenizer a byte-level one, whatever the folder says.
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_the_folder_loads_and_without_iterations_is_the_base(kind, tmp_path):
    source = write_base(tmp_path / "plain", kind)
    returned = init_checkpoint(source, tmp_path / "out", settings(tmp_path, "timestep: {kind: learned}\n"))
    made = load_checkpoint(type(returned), tmp_path / "out")
    assert not made.training
    assert made.config == returned.config.replace(slr_version=made.config.slr_version)
    assert is_the_base(made, tiny.base(kind))
    (result,) = generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 3, "criterion": "fixed"})])
    assert result.iterations == 3
    for name, weight in returned.state_dict().items():
        assert torch.equal(weight, made.state_dict()[name]), name


def test_the_source_is_left_as_it_was(source, tmp_path):
    init_checkpoint(source, tmp_path / "out")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(source).state_dict(), tiny.base().state_dict(), rtol=0, atol=0
    )


def test_untrained_adapters_have_no_effect(source, tmp_path):
    made = init_checkpoint(source, tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), made.adapters.use("loop_02"):
        torch.testing.assert_close(made.base(input_ids=ids).logits, tiny.base()(input_ids=ids).logits)


def test_the_seed_makes_the_new_weights(source, tmp_path):
    block = settings(tmp_path, "workspace: block")
    vectors = [
        init_checkpoint(source, tmp_path / f"out{i}", block, seed=seed).workspace.vectors.detach()
        for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_the_card_tells_what_it_is(source, tmp_path):
    made = init_checkpoint(source, tmp_path / "out", seed=7)
    card = (tmp_path / "out" / "README.md").read_text()
    assert describe_model(made).sizes in card
    assert "seed 7" in card
    assert "`plain`" in card
    assert str(tmp_path) not in card


# -- loop.yaml -------------------------------------------------------------------------------------------


def test_one_line_is_enough(tmp_path):
    config = InitConfig.from_yaml(settings(tmp_path, "workspace: block\n")).config()
    assert config.loop.workspace == "block"
    assert config.loop == InitConfig().config().loop.model_copy(update={"workspace": "block"})


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n"])
def test_an_empty_file_is_all_defaults(text, tmp_path):
    assert InitConfig.from_yaml(settings(tmp_path, text)).config() == InitConfig().config()


def test_loop_and_texts_are_read(source, tmp_path):
    text = "lora: {rank: [1, 2], decode_rank: 3}\ntrained_iterations: 2\ntext: {stop: [w9], answer_prefix: w7}\n"
    made = init_checkpoint(source, tmp_path / "out", settings(tmp_path, text))
    assert (made.config.text.stop, made.config.text.answer_prefix) == (("w9",), "w7")
    folders = {path.name for path in (tmp_path / "out" / "loops").iterdir()}
    assert folders == {"loop_01", "loop_02", "decode"}
    ranks = {
        name: json.loads((tmp_path / "out" / "loops" / name / "adapter_config.json").read_text())["r"]
        for name in folders
    }
    assert ranks == {"loop_01": 1, "loop_02": 2, "decode": 3}


WRONG = {
    "unknown": ("workspaces: block", "workspaces"),
    "nested": ("lora: {ranks: 3}", "lora.ranks"),
    "text": ("text: {prefix: x}", "text.prefix"),
    "choice": ("workspace: sideways", "workspace"),
    "misfit": ("convergence: {criterion: learned}", "halting_head"),
    "list": ("- workspace", "config"),
    "word": ("block", "config"),
    "yaml": ("a: [", "not a readable YAML"),
    "object": ("a: !!python/object:os.x 1", "not a readable YAML"),
    "date": ("workspace: 2020-01-01", "workspace: Input should be 'append'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_write_nothing(case, source, tmp_path):
    text, named = WRONG[case]
    path = settings(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        init_checkpoint(source, tmp_path / "out", path)
    assert named in str(caught.value)
    assert "loop.yaml" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(source, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        init_checkpoint(source, tmp_path / "out", tmp_path / "nowhere.yaml")


# -- what is refused -------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    init_checkpoint(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        init_checkpoint(source, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        init_checkpoint(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_sliding_window_is_kept(tmp_path):
    made = init_checkpoint(write_base(tmp_path / "plain", "mistral"), tmp_path / "out")
    assert made.max_positions == load_checkpoint(LatentReasoner, tmp_path / "out").max_positions == 16


def test_a_target_that_the_base_does_not_have_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="no_such_layer"):
        init_checkpoint(source, tmp_path / "out", settings(tmp_path, "lora: {target_modules: [no_such_layer]}"))
    assert not (tmp_path / "out").exists()


def spoil(folder, case):
    match case:
        case "no-tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).unlink()
        case "no-weights":
            (folder / "model.safetensors").unlink()
        case "pickled":
            state = tiny.base().state_dict()
            (folder / "model.safetensors").unlink()
            torch.save(state, folder / "pytorch_model.bin")
        case "truncated":
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:1000])
        case "unknown-model":
            tiny.edit_json(folder / "config.json", model_type="nonesuch", architectures=["Nonesuch"])
        case "no-config":
            (folder / "config.json").unlink()


@pytest.mark.parametrize("case", ["no-weights", "pickled", "truncated", "unknown-model", "no-config"])
def test_a_base_that_cannot_be_loaded_is_a_checkpoint_error(case, tmp_path):
    source = write_base(tmp_path / "plain")
    spoil(tmp_path / "plain", case)
    with pytest.raises(CheckpointError, match="cannot be loaded as a causal language model"):
        init_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_tokenizer(kind, tmp_path):
    """Also where transformers would make one of its special tokens alone (gpt2)."""
    source = write_base(tmp_path / "plain", kind)
    spoil(tmp_path / "plain", "no-tokenizer")
    with pytest.raises(CheckpointError, match=r"plain: there is no tokenizer in it; copy tokenizer\.json"):
        init_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["prosqa", DEFAULT_CHECKPOINT])
def test_latent_reasoner_as_base(base, tmp_path):
    """It is refused with the folder of its base model, which is accepted."""
    with pytest.raises(
        CheckpointError, match="already a latent reasoner, not a base model; its base model is in "
    ) as e:
        init_checkpoint(str(base), tmp_path / "out")
    assert str(e.value).endswith(str(DEFAULT_CHECKPOINT / "base"))


@pytest.mark.parametrize(
    "base", ["{tmp}/nope", "./nope", "../nope", "models/nope", "nope/", "a/b/c", "nope.gguf", "./nope.gguf"]
)
def test_mistyped_folder(base, tmp_path, monkeypatch):
    """It is reported at once, without the hub."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slr_core.checkpoint.hub.get_hf_file_metadata", None)
    base = base.format(tmp=tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(base)}: no such file or folder$"):
        init_checkpoint(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("base", "meant"),
    [("my-reasonr", "my-reasoner"), ("run/mine", "runs/mine"), ("runs/mime", "runs/mine"), ("prosaq", "prosqa")],
)
def test_nearly_a_folder(base, meant, tmp_path, monkeypatch):
    """It is reported at once, without the hub, and the folder is suggested."""
    (tmp_path / "my-reasoner").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slr_core.checkpoint.hub.get_hf_file_metadata", None)
    for load in (init_checkpoint, lambda base, _: load_checkpoint(LatentReasoner, base)):
        with pytest.raises(CheckpointError, match=rf"^{base}: no such file or folder; did you mean {meant}\?"):
            load(base, tmp_path / "out")


@pytest.mark.parametrize("base", ["/no/where", "no-such/model", "a b c", "", "/no/where.gguf"])
def test_a_base_that_is_not_there_is_a_checkpoint_error(base, tmp_path):
    with pytest.raises(CheckpointError):
        init_checkpoint(base, tmp_path / "out")


def test_a_tokenizer_larger_than_the_base_is_refused(tmp_path):
    # What it would write could not be loaded.
    source = write_base(tmp_path / "plain")
    words = tiny.tokenizer().__class__.from_pretrained(source)
    words.add_tokens(["w100"])
    words.save_pretrained(source)
    with pytest.raises(CheckpointError, match="the tokenizer has tokens up to 40, the model 40 embeddings"):
        init_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["missing_keys", "mismatched_keys"])
def test_a_base_with_gaps_is_refused(case, tmp_path):
    # transformers would fill them with random weights and go on.
    source = write_base(tmp_path / "plain")
    state = {name: x.clone() for name, x in tiny.base().state_dict().items()}
    head = state.pop("lm_head.weight")
    if case == "mismatched_keys":
        state["lm_head.weight"] = head[:-1].clone()
    save_file(state, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight|cannot be loaded"):
        init_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- GGUF ------------------------------------------------------------------------------------------------


def test_a_gguf_file(tmp_path, monkeypatch):
    plain = write_gguf(tmp_path / "plain.gguf")
    reader = Mock(wraps=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    init_checkpoint(str(tmp_path / "plain.gguf"), tmp_path / "out", settings(tmp_path, "workspace: prompt"))
    made = load_checkpoint(type(tiny.reasoner()), tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(made.base(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert made.config.loop.workspace == "prompt"
    assert reader.call_count == 1, "parsing the metadata takes seconds"
    assert gguf.GGUFReader is reader
    assert "quantization_config" not in json.loads((tmp_path / "out" / "base" / "config.json").read_text())


def test_gguf_is_refused_by_its_metadata(tmp_path, monkeypatch):
    write_gguf(tmp_path / "plain.gguf", "gemma2")  # caps its logits
    monkeypatch.setattr("slr_core.checkpoint.pretrained.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ConfigError, match=r"plain\.gguf \(gemma2\): .* not supported"):
        init_checkpoint(str(tmp_path / "plain.gguf"), tmp_path / "out")


def test_packaged_base(tmp_path, monkeypatch):
    """Its file is dequantized once; the folder of the cache appears when it is complete."""
    packaged, cache = PACKAGED["smollm2"], tmp_path / "cache"
    monkeypatch.setenv("SLR_CACHE_DIR", str(cache))
    monkeypatch.setattr("slr_core.checkpoint.pretrained.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"base model smollm2 needs the extra `smollm2` .no module {packaged.module}"):
        init_checkpoint("smollm2", tmp_path / "out")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("slr_core.checkpoint.pretrained.find_spec", lambda name: spec)
    write_gguf(tmp_path / packaged.file)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            init_checkpoint("smollm2", tmp_path / "out")
    assert {path.suffix for path in (cache / "bases").iterdir()} <= {".part", ".lock"}
    made = init_checkpoint("smollm2", tmp_path / "out")
    assert made.base.dtype == torch.float32
    assert f"`{packaged.file}`" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr("gguf.GGUFReader", Mock(side_effect=AssertionError))
    again = init_checkpoint("smollm2", tmp_path / "again")
    assert all(torch.equal(x, again.base.state_dict()[key]) for key, x in made.base.state_dict().items())


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SLR_CACHE_DIR", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/slr")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/slr")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SLR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set SLR_CACHE_DIR to a folder that can be written"):
        dequantized_folder(tmp_path / "file", "0" * 64)


def test_dtype(tmp_path):
    """That of the base, unless another one is asked for, which must hold the weights."""
    source = tmp_path / "plain"
    tiny.base().to(torch.bfloat16).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    assert init_checkpoint(str(source), tmp_path / "kept").base.dtype == torch.bfloat16
    made = init_checkpoint(str(source), tmp_path / "chosen", dtype=torch.float32)
    assert made.base.dtype == load_checkpoint(LatentReasoner, tmp_path / "chosen").base.dtype == torch.float32
    large = tiny.base()
    large.model.norm.weight.data *= 1e6
    large.save_pretrained(source)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds values .* finite in torch\.float16"):
        init_checkpoint(str(source), tmp_path / "half", dtype=torch.float16)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "plain.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("slr_core.checkpoint.pretrained.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra `gguf`"):
        init_checkpoint(str(tmp_path / "plain.gguf"), tmp_path / "out")


def test_a_file_that_is_no_gguf_is_a_checkpoint_error(tmp_path):
    (tmp_path / "plain.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        init_checkpoint(str(tmp_path / "plain.gguf"), tmp_path / "out")
