"""PCCoT: latent positions that each read their left neighbour, all of them in every iteration."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.errors import SLRError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.importers import plain, published
from tests.checkpoint.importers.test_coconut import states


def convert(made, out, *, base=True, **options):
    where = str(made.base) if base else None
    request = Import("pccot", str(made.checkpoint), where, out, ImportOptions(**options), dtype=torch.float64)
    return import_checkpoint(request)


def load(made, out, **options):
    convert(made, out, **options)
    return load_checkpoint(LatentReasoner, out)


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_same_as_plain(kind, adapter, projected, tmp_path):
    """States and tokens are those of plain transformers calls, in float64; the projection counts beside an adapter."""
    made = published.pccot(tmp_path, kind, adapter=adapter, projected=projected)
    ours = load(made, tmp_path / "out", base=adapter)
    vector = made.model.get_input_embeddings().weight[made.vocab + 2].double()
    for text in tiny.PROMPTS[:3]:
        prompt, request = made.prompt(text, 0), tiny.request(ours, text, max_new_tokens=8)
        assert list(request.prompt_ids) == prompt
        embeds, passes = plain.parallel(made.model, prompt, vector, 4, 3, made.project)
        torch.testing.assert_close(states(ours, prompt)[1:], passes[:-1], rtol=0, atol=1e-9)
        (result,) = generate(ours, [request])
        prefix = [made.vocab + 1, *tiny.ids("w7 w8")]
        assert list(request.answer_prefix_ids) == prefix
        assert list(result.token_ids) == plain.write(made.model, embeds, prefix, 8, tiny.EOS)


def test_base_without_prefix(tmp_path):
    """The published GPT-2 has its tensors without a prefix, and buffers besides."""
    made = published.pccot(tmp_path)
    expected = states(load(made, tmp_path / "out"), made.prompt("w1 w2", 0))
    path = made.base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path)
    found = states(load(made, tmp_path / "again"), made.prompt("w1 w2", 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def edit_tensors(made, change):
    path = made.checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def damage(made, case):
    checkpoint, wrapped = made.checkpoint, "base_model.model."
    match case:
        case "no args":
            (checkpoint / "pccot_args.json").unlink()
        case "empty config":
            (checkpoint / "config.json").write_text("")
        case "other type":
            tiny.edit_json(checkpoint / "config.json", model_type="gpt2")
        case "no iterations":
            tiny.edit_json(checkpoint / "config.json", num_iterations=None)
        case "many latents":
            tiny.edit_json(checkpoint / "pccot_args.json", num_latent_tokens=2000)
        case "no markers":
            tiny.tokenizer().__class__.from_pretrained(made.base).save_pretrained(checkpoint)
        case "other markers":
            tiny.edit_json(checkpoint / "pccot_args.json", bot_token_id=3)
        case "extra key":
            edit_tensors(made, lambda tensors: tensors.update({wrapped + "x.weight": torch.zeros(1)}))
        case "other key":
            edit_tensors(made, lambda tensors: tensors.update({"x": torch.zeros(1)}))
        case "rows":
            edit_tensors(made, lambda tensors: tensors.pop(wrapped + "transformer.wte.token_adapter.base_layer.weight"))
        case "indices":
            tiny.edit_json(checkpoint / "adapter_config.json", trainable_token_indices={"wte": [40, 41, 42]})
        case "no rank":
            tiny.edit_json(checkpoint / "adapter_config.json", r=None)
        case "dora":
            tiny.edit_json(checkpoint / "adapter_config.json", use_dora=True)
        case "half a pair":
            edit_tensors(made, lambda tensors: tensors.pop(wrapped + "transformer.h.0.attn.c_attn.lora_B.weight"))
        case "other base":
            tiny.base("gpt2", seed=4).save_pretrained(made.base)
        case "base without weights":
            (made.base / "model.safetensors").unlink()
        case "no folder":
            made.checkpoint = made.checkpoint / "adapter_model.safetensors"


DAMAGED = {
    "no args": "not readable as JSON",
    "empty config": "not readable as JSON",
    "other type": "model_type must be one of pccot-gpt2, pccot-llama",
    "no iterations": "num_iterations must be a number from 1 to 1024",
    "many latents": "num_latent_tokens must be a number from 1 to 1024",
    "no markers": "its tokenizer has no token of the id 40, bot_token_id",
    "other markers": r"has w0 at the id 3, where pccot_args\.json expects <pcot\.bot>",
    "extra key": r"1 tensors have no place in this form, such as x\.weight",
    "other key": "1 tensors have no place in this form, such as x",
    "rows": r"the trained rows of transformer\.wte are incomplete",
    "indices": "trainable_token_indices do not fit the rows",
    "no rank": "r and lora_alpha must be numbers",
    "dora": "use_dora is not supported",
    "half a pair": "is incomplete",
    "other base": "most rows of the embedding table differ",
    "base without weights": "it has no weights",
    "no folder": "expected a folder",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, tmp_path):
    """One clear error each, and nothing is written."""
    made = published.pccot(tmp_path)
    damage(made, case)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SLRError, match=DAMAGED[case]) as caught:
        convert(made, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 5}, "--latents is 5, and the checkpoint's files say 4"),
        ({"iterations": 2}, "--iterations is 2, and the checkpoint's files say 3"),
        ({"lora_alpha": 2.0}, "--lora-alpha says nothing"),
        ({"base": False}, "--base is needed: the checkpoint is an adapter"),
    ],
)
def test_options(options, message, tmp_path):
    with pytest.raises(SLRError, match=message):
        convert(published.pccot(tmp_path), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_numbers_may_be_given(tmp_path):
    """Options that agree with the files are accepted; the loop has the files' lengths."""
    loop = load(published.pccot(tmp_path), tmp_path / "out", latents=4, iterations=3).config.loop
    assert (loop.feedback, loop.block_size, loop.min_iterations, loop.max_iterations) == ("shifted", 4, 3, 3)
    assert "num_iterations" not in json.loads((tmp_path / "out" / "base" / "config.json").read_text())
