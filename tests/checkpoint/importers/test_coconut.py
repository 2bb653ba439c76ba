"""Coconut: a chain of thoughts, each the state before it."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.errors import CheckpointError, ConfigError, SLRError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.importers import plain, published


def convert(made, out, **changes):
    options = ImportOptions(**{"latents": 4, **changes.pop("options", {})})
    return import_checkpoint(Import("coconut", str(made.checkpoint), str(made.base), out, options, **changes))


def load(made, out, **changes):
    convert(made, out, **changes)
    return load_checkpoint(LatentReasoner, out, dtype=torch.float64)


@torch.no_grad()
def states(reasoner, prompt):
    """h_0 ... h_R in the model's own dtype."""
    ids = torch.tensor([prompt])
    return reasoner.unroll(reasoner.encode(ids, torch.ones_like(ids)), reasoner.config.loop.max_iterations)[0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_same_as_plain(kind, tmp_path):
    """Thoughts and tokens are those of plain transformers calls, in float64; heads are tied, untied and tied."""
    made = published.coconut(tmp_path, kind)
    ours, model = load(made, tmp_path / "out"), made.model.double()
    for text in tiny.PROMPTS[:3]:
        prompt, request = made.prompt(text, 0), tiny.request(ours, text, max_new_tokens=8)
        assert list(request.prompt_ids) == prompt
        embeds = plain.chain(model, prompt, 4)
        torch.testing.assert_close(states(ours, prompt)[:-1, 0], embeds[-4:], rtol=0, atol=1e-9)
        (result,) = generate(ours, [request])
        assert list(result.token_ids) == plain.write(model, embeds, [made.vocab + 1], 8, tiny.EOS)


def test_card(tmp_path):
    made = published.coconut(tmp_path)
    convert(made, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "slr import coconut checkpoint_7 --out out --base base --latents 4" in card
    assert "embedding.weight (1 tensor): a copy of the embedding table" in card
    assert "licence of the checkpoint | not stated" in card
    assert str(tmp_path) not in card


def test_early_exit_is_off(tmp_path):
    """No criterion and no guard shortens a trained chain."""
    loop = load(published.coconut(tmp_path), tmp_path / "out").config.loop
    assert (loop.min_iterations, loop.max_iterations) == (4, 4)
    assert loop.convergence.criterion == "fixed"
    assert loop.guard.norm_factor == 1e6


def test_only_the_end_token_ends(tmp_path):
    """Other end tokens of the base's generation config do not end an answer."""
    made = published.coconut(tmp_path)
    (made.base / "generation_config.json").write_text(json.dumps({"eos_token_id": [tiny.EOS, 7, 8]}))
    assert load(made, tmp_path / "out").end_tokens == {tiny.EOS}


def test_begin_token(tmp_path):
    """A begin token that the tokenizer adds by itself stands before the question alone, as in Llama's."""
    made = published.coconut(tmp_path, "llama")
    tiny.edit_json(made.base / "config.json", auto_map={"AutoConfig": "their.Code"})
    words = tiny.tokenizer().__class__.from_pretrained(made.base)
    words._tokenizer.post_processor = TemplateProcessing(single="w9 $A", special_tokens=[("w9", 12)])
    words.save_pretrained(made.base)
    ours = load(made, tmp_path / "out")
    request = tiny.request(ours, "w1 w2")
    assert list(request.prompt_ids) == [12, *tiny.ids("w1 w2"), made.vocab]
    assert list(request.answer_prefix_ids) == [made.vocab + 1]
    assert "their.Code" not in (tmp_path / "out" / "base" / "config.json").read_text()


def test_transformers_folder(tmp_path):
    """A folder with the three tokens is read as well; one without them is a plain model."""
    made = published.coconut(tmp_path)
    expected = states(load(made, tmp_path / "out"), made.prompt("w1 w2", 0))
    folder = tmp_path / "folder"
    made.model.save_pretrained(folder)
    tokenizer = tiny.tokenizer().__class__.from_pretrained(made.base)
    tokenizer.add_tokens(list(published.COCONUT))
    tokenizer.save_pretrained(folder)
    import_checkpoint(Import("coconut", str(folder), None, tmp_path / "out2", ImportOptions(latents=4)))
    again = load_checkpoint(LatentReasoner, tmp_path / "out2", dtype=torch.float64)
    torch.testing.assert_close(states(again, made.prompt("w1 w2", 0)), expected, rtol=0, atol=0)
    plain_folder = tmp_path / "plain"
    tiny.base("gpt2").save_pretrained(plain_folder)
    tiny.tokenizer().save_pretrained(plain_folder)
    with pytest.raises(CheckpointError, match=r"a plain model, to which `slr init`"):
        import_checkpoint(Import("coconut", str(plain_folder), None, tmp_path / "out3", ImportOptions(latents=4)))


# -- what is refused -------------------------------------------------------------------------------------


class Runs:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edit_state(made, change):
    state = torch.load(made.checkpoint, weights_only=True)
    change(state)
    torch.save(state, made.checkpoint)


def rewrite_zip(path, compression):
    entries = {}
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def damage(made, case):
    name = "base_causallm.transformer.h.1.ln_1.bias"
    match case:
        case "missing key":
            edit_state(made, lambda state: state.pop(name))
        case "extra key":
            edit_state(made, lambda state: state.update({"base_causallm.extra": torch.zeros(1)}))
        case "unprefixed key":
            edit_state(made, lambda state: state.update({"extra": torch.zeros(1)}))
        case "shape":
            edit_state(made, lambda state: state.update({name: torch.zeros(5)}))
        case "not finite":
            edit_state(made, lambda state: state.update({name: torch.full((32,), torch.nan)}))
        case "integers":
            edit_state(made, lambda state: state.update({name: torch.zeros(32, dtype=torch.long)}))
        case "untied head":
            edit_state(made, lambda state: state["base_causallm.lm_head.weight"].add_(1))
        case "other embedding":
            edit_state(made, lambda state: state["embedding.weight"].add_(1))
        case "plain model":
            torch.save(made.model.state_dict(), made.checkpoint)
        case "code":
            edit_state(made, lambda state: state.update({"x": Runs(made.checkpoint.parent / "ran")}))
        case "no tensors":
            torch.save({"step": 3}, made.checkpoint)
        case "a list":
            torch.save([torch.zeros(1)], made.checkpoint)
        case "no pickle":
            made.checkpoint.write_bytes(b"not a checkpoint")
        case "truncated":
            made.checkpoint.write_bytes(made.checkpoint.read_bytes()[:-2000])
        case "compressed":
            rewrite_zip(made.checkpoint, zipfile.ZIP_DEFLATED)
        case "claims more":
            edit_state(made, lambda state: state.update({name: torch.zeros(1).expand(2**40)}))
        case "nothing":
            made.checkpoint.unlink()
        case "empty config":
            (made.base / "config.json").write_text("")
        case "no model type":
            (made.base / "config.json").write_text("{}")
        case "no tokenizer":
            for file in made.base.glob("tokenizer*"):
                file.unlink()
        case "other tokenizer":
            words = tiny.tokenizer().__class__.from_pretrained(made.base)
            words.add_tokens(["w100"])
            words.save_pretrained(made.base)
        case "smaller tokenizer":
            path = made.base / "tokenizer.json"
            words = json.loads(path.read_text())
            del words["model"]["vocab"]["w36"]
            path.write_text(json.dumps(words))
        case "other base":
            tiny.base("llama").config.save_pretrained(made.base)
        case "larger base":
            tiny.edit_json(made.base / "config.json", n_layer=3)
        case "wider base":
            tiny.edit_json(made.base / "config.json", n_embd=64)


DAMAGED = {
    "missing key": r"1 tensors are missing, such as transformer\.h\.1\.ln_1\.bias",
    "extra key": "1 tensors are unknown, such as extra",
    "unprefixed key": "1 tensors have no place in this form, such as extra",
    "shape": r"has shape \[5\], expected \[32\]",
    "not finite": "values that are not finite",
    "integers": "expected a floating-point one",
    "untied head": "differ, and the base ties them",
    "other embedding": "not a copy of the embedding table",
    "plain model": "a plain model, to which `slr init` adds",
    "code": r"only tensors are read \(it wants to call",
    "no tensors": "expected a state dict of tensors, step is a int",
    "a list": "expected a state dict, got list",
    "no pickle": "neither a safetensors file nor one that torch.save wrote",
    "truncated": "neither a safetensors file nor one that torch.save wrote",
    "compressed": "is compressed",
    "claims more": "claims more values than the file holds",
    "nothing": "no such file or folder",
    "empty config": "not readable as JSON",
    "no model type": "has no model_type",
    "no tokenizer": "it has no tokenizer",
    "other tokenizer": "cannot get the id 40; is it the base",
    "smaller tokenizer": "has 39 tokens, so .* cannot get the id 40; is it the base",
    "other base": r"has no tensor model\.embed_tokens\.weight",
    "larger base": r"12 tensors are missing, such as transformer\.h\.2",
    "wider base": "expected .* by this base",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, tmp_path):
    """One clear error each, and nothing is written."""
    made = published.coconut(tmp_path)
    damage(made, case)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SLRError, match=DAMAGED[case]) as caught:
        convert(made, tmp_path / "runs" / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_large_pickle_programs(tmp_path, monkeypatch):
    made = published.coconut(tmp_path)
    monkeypatch.setattr("slr_core.checkpoint.importers.files.MAX_PICKLE_PROGRAM_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"data\.pkl has more than 100 bytes"):
        convert(made, tmp_path / "out")
    monkeypatch.setattr("slr_core.checkpoint.importers.files.MAX_PICKLE_BYTES", 100)
    with pytest.raises(CheckpointError, match="a pickle of more than 100 bytes is not read"):
        convert(made, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": None}, "--latents is needed: the number of thoughts"),
        ({"latents": 65}, "--latents must be at most 64"),
        ({"iterations": 2}, "--iterations says nothing about this coconut checkpoint"),
        ({"lora_alpha": 2.0}, "--lora-alpha says nothing"),
    ],
)
def test_options(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        convert(published.coconut(tmp_path), tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_full_folder(tmp_path):
    made = published.coconut(tmp_path)
    (tmp_path / "out").mkdir()
    convert(made, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        convert(made, tmp_path / "out")


# -- recorded output -------------------------------------------------------------------------------------


@torch.inference_mode()
def record(made, path, latents=4):
    """What the peer's code would have written, by plain calls of transformers."""
    cases, thoughts, model = [], {}, made.model
    for number, text in enumerate(tiny.PROMPTS[:2]):
        prompt = made.prompt(text, 0)
        embeds = plain.chain(model, prompt, latents)
        tokens = plain.write(model, embeds, [made.vocab + 1], 6, tiny.EOS)
        closed = torch.cat([embeds, model.get_input_embeddings().weight[[made.vocab + 1]]])
        top = model.get_output_embeddings()(plain.states(model, closed)[-1]).topk(5)
        pairs = [list(pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        cases.append({"prompt": text, "prompt_ids": prompt, "tokens": tokens, "first_logits_top5": pairs})
        thoughts[str(number)] = embeds[-latents:].clone()
    path.write_text(json.dumps({"cases": cases, "new_tokens": 6}))
    save_file(thoughts, path.parent / "thoughts.safetensors")


def test_expect(tmp_path):
    made = published.coconut(tmp_path)
    record(made, tmp_path / "expected.json")
    compared = convert(made, tmp_path / "out", expect=tmp_path / "expected.json").comparison
    assert (compared.cases, compared.equal_prompts, compared.equal_answers) == (2, 2, 2)
    assert compared.thoughts < 1e-4
    assert compared.logits < 1e-4
    assert "2 of 2 greedy answers equal, thoughts to " in (tmp_path / "out" / "README.md").read_text()


EXPECT_MESSAGES = {
    "latents": "not reproduced",
    "tokens": "not reproduced",
    "prompt_ids": "not reproduced",
    "logits": "a logit of a first token differs",
    "pairs": "first_logits_top5 must be pairs",
    "thoughts": "a thought differs by 0.01",
    "no cases": "no cases",
    "no file": "no such file",
}


@pytest.mark.parametrize("case", EXPECT_MESSAGES)
def test_expect_differs(case, tmp_path):
    """Nothing is written where recorded output is not reproduced."""
    made, path = published.coconut(tmp_path), tmp_path / "expected.json"
    record(made, path, latents=3 if case == "latents" else 4)
    if case in ("tokens", "prompt_ids"):
        data = json.loads(path.read_text())
        data["cases"][1][case][0] += 1
        path.write_text(json.dumps(data))
    elif case in ("logits", "pairs"):
        data = json.loads(path.read_text())
        data["cases"][1]["first_logits_top5"][4] = [3, 99.0] if case == "logits" else [9999, 1.0]
        path.write_text(json.dumps(data))
    elif case == "thoughts":
        beside = path.parent / "thoughts.safetensors"
        save_file({name: x + 0.01 for name, x in load_file(beside).items()}, beside)
    elif case == "no cases":
        path.write_text("{}")
    elif case == "no file":
        path.unlink()
    with pytest.raises(SLRError, match=EXPECT_MESSAGES[case]):
        convert(made, tmp_path / "out", expect=path)
    assert not (tmp_path / "out").exists()
