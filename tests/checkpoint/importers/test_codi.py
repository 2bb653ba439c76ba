"""CODI: a chain of thoughts, each the projected state before it; its adapter acts in every pass."""

import json

import pytest
import torch

from slr_core.checkpoint.importers import Import, import_checkpoint
from slr_core.checkpoint.importers.peer import ImportOptions
from slr_core.checkpoint.read import load_checkpoint
from slr_core.engine.engine import Engine
from slr_core.errors import SLRError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from tests import tiny
from tests.checkpoint.importers import plain, published
from tests.checkpoint.importers.test_coconut import states


def convert(made, out, peer="codi", dtype=None, **options):
    chosen = ImportOptions(**{"latents": 3, "lora_alpha": 3.0, **options})
    return import_checkpoint(Import(peer, str(made.checkpoint), str(made.base), out, chosen, dtype=dtype))


def load(made, out, *others, **options):
    convert(made, out, *others, dtype=torch.float64, **options)
    return load_checkpoint(LatentReasoner, out)


FORMS = {
    "gpt2": {},
    "llama": {"kind": "llama"},
    "qwen3": {"kind": "qwen3"},
    "shards": {"kind": "llama", "shards": True},
    "tied shards": {"kind": "qwen3", "shards": True},
    "no norm": {"norm": False, "inner": 48},
    "not projected": {"projected": False},
    "no adapter": {"rank": 0},
}


@pytest.mark.parametrize("form", FORMS)
def test_same_as_plain(form, tmp_path):
    """Thoughts and tokens are those of plain transformers calls with merged weights, in float64."""
    made = published.codi(tmp_path, **FORMS[form])
    ours = load(made, tmp_path / "out", lora_alpha=None if form == "no adapter" else 3.0)
    for text in tiny.PROMPTS[:3]:
        prompt, request = made.prompt(text, 1), tiny.request(ours, text, max_new_tokens=8)
        assert list(request.prompt_ids) == prompt
        embeds = plain.chain(made.model, prompt, 3, made.project)
        found = ours.project_in(states(ours, prompt)[:-1, 0])
        torch.testing.assert_close(found, embeds[-3:], rtol=0, atol=1e-9)
        (result,) = generate(ours, [request])
        assert list(result.token_ids) == plain.write(made.model, embeds, [42], 8, tiny.EOS, never=[42])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_kept_adapter(kind, tmp_path):
    """An adapter that is not merged acts in every pass: the same states and tokens, over unchanged base weights."""
    made = published.codi(tmp_path, kind)
    convert(made, tmp_path / "out", keep_adapter=True)
    ours = load_checkpoint(LatentReasoner, tmp_path / "out", dtype=torch.float64)
    assert (ours.config.loop.lora.covers, ours.config.loop.adapters) == ("all", ("loop_01",))
    prompt, request = made.prompt(tiny.PROMPTS[1], 1), tiny.request(ours, tiny.PROMPTS[1], max_new_tokens=8)
    embeds = plain.chain(made.model, prompt, 3, made.project)
    found = ours.project_in(states(ours, prompt)[:-1, 0])
    torch.testing.assert_close(found, embeds[-3:], rtol=0, atol=1e-9)
    (result,) = generate(ours, [request])
    assert list(result.token_ids) == plain.write(made.model, embeds, [42], 8, tiny.EOS, never=[42])


def test_shared_base(tmp_path):
    """Two models with the same base are served together, each with its own adapter over prompt and answer."""
    for name, alpha in (("first", 3.0), ("second", 9.0)):
        (tmp_path / name).mkdir()
        made = published.codi(tmp_path / name, alpha=alpha)
        convert(made, tmp_path / name / "out", keep_adapter=True, lora_alpha=alpha)
    alone = {}
    for name in ("first", "second"):
        ours = load_checkpoint(LatentReasoner, tmp_path / name / "out")
        requests = [tiny.request(ours, text, max_new_tokens=6) for text in tiny.PROMPTS[:4]]
        alone[name] = [result.token_ids for result in generate(ours, requests)]
    assert alone["first"] != alone["second"]
    with Engine.from_pretrained(str(tmp_path / "first" / "out"), slots=5, threads=1) as engine:
        engine.load_loop_set("second", str(tmp_path / "second" / "out"))
        for _ in range(2):  # the second time from the prefix cache
            futures = [
                (name, i, engine.submit(request, loop_set=None if name == "first" else "second"))
                for i, request in enumerate(requests)
                for name in ("first", "second")
            ]
            for name, i, future in futures:
                assert future.result().token_ids == alone[name][i]
        assert engine.counters.reused_tokens > 0


def test_float32(tmp_path):
    """Without a dtype, weights are merged and written in the widest format of the checkpoint, fp32."""
    made = published.codi(tmp_path)
    convert(made, tmp_path / "out")
    ours, prompt = load_checkpoint(LatentReasoner, tmp_path / "out"), made.prompt(tiny.PROMPTS[1], 1)
    assert ours.base.dtype == torch.float32
    wanted = plain.chain(made.model, prompt, 3, made.project)[-3:].float()
    torch.testing.assert_close(ours.project_in(states(ours, prompt)[:-1, 0]), wanted, rtol=0, atol=1e-4)


def test_end_token(tmp_path):
    """With ``--keep-eos`` the end token stands before the opening marker and after the closing one."""
    ours = load(published.codi(tmp_path), tmp_path / "out", keep_eos=True)
    request = tiny.request(ours, "w1")
    assert list(request.prompt_ids) == [*tiny.ids("w1"), tiny.EOS, 41]
    assert list(request.answer_prefix_ids) == [42, tiny.EOS]


def test_prompt_spaces(tmp_path):
    """A question is stripped, and each pair of spaces becomes one, once over."""
    text = load(published.codi(tmp_path), tmp_path / "out").config.text
    assert text.wrap_prompt("\n a  b   c    d ") == "a b  c  d<|bot|>"


def test_closing_marker_is_never_written(tmp_path):
    made = published.codi(tmp_path, kind="llama")
    ours = load(made, tmp_path / "out")
    with torch.no_grad():
        ours.base.get_output_embeddings().weight[42] = ours.base.get_output_embeddings().weight.sum(0) * 100
        ours.base.get_output_embeddings().weight[41] = -ours.base.get_output_embeddings().weight[42]
    (result,) = generate(ours, [tiny.request(ours, tiny.PROMPTS[1], max_new_tokens=12)])
    assert 42 not in result.token_ids


def test_larger_table(tmp_path):
    """Where the base's table is larger than its vocabulary, the markers still follow the table."""
    made = published.codi(tmp_path, rank=0)
    path = made.base / "tokenizer.json"
    words = json.loads(path.read_text())
    for word in ("w35", "w36"):
        del words["model"]["vocab"][word]
    path.write_text(json.dumps(words))
    ours = load(made, tmp_path / "out", lora_alpha=None)
    assert list(tiny.request(ours, "w1").prompt_ids) == [*tiny.ids("w1"), 41]
    assert ours.tokenizer.convert_tokens_to_ids("<|unused-39|>") == 39


@pytest.mark.parametrize("peer", ["simcot-coconut", "simcot-codi"])
def test_simcot(peer, tmp_path):
    """The auxiliary decoder is dropped by name, and the rest is the peer that it was trained on."""
    made = published.simcot_coconut(tmp_path) if peer == "simcot-coconut" else published.simcot_codi(tmp_path)
    alpha = None if peer == "simcot-coconut" else 3.0
    ours = load(made, tmp_path / "out", peer, lora_alpha=alpha)
    inner = load(made, tmp_path / "again", peer, lora_alpha=alpha)
    assert "auxiliary decoder" in (tmp_path / "out" / "README.md").read_text()
    prompt = made.prompt(tiny.PROMPTS[1], 0 if alpha is None else 1)
    model = made.model.double()
    embeds = plain.chain(model, prompt, 3, made.project)
    torch.testing.assert_close(ours.project_in(states(ours, prompt)[:-1, 0]), embeds[-3:], rtol=0, atol=1e-9)
    assert ours.state_dict().keys() == inner.state_dict().keys()


def test_simcot_first_step(tmp_path):
    """A checkpoint without the auxiliary decoder is that of the peer itself."""
    made = published.coconut(tmp_path)
    convert(made, tmp_path / "out", "simcot-coconut", lora_alpha=None)
    assert "Dropped: embedding.weight" in (tmp_path / "out" / "README.md").read_text()


# -- what is refused -------------------------------------------------------------------------------------


def edit_state(made, change):
    path = made.checkpoint / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def damage(made, case):
    layer = "codi.base_model.model.transformer.h.0.attn.c_attn"
    shards = sorted(made.checkpoint.glob("*.safetensors"))
    match case:
        case "half a pair":
            edit_state(made, lambda state: state.pop(f"{layer}.lora_B.default.weight"))
        case "other rank":
            edit_state(made, lambda state: state.update({f"{layer}.lora_B.default.weight": torch.zeros(96, 3)}))
        case "other layer":
            edit_state(made, lambda state: state.update({f"{layer}.lora_B.default.weight": torch.zeros(64, 2)}))
        case "no layer":
            edit_state(made, lambda state: state.pop(f"{layer}.base_layer.weight"))
        case "half a projection":
            edit_state(made, lambda state: state.pop("prj.3.bias"))
        case "decoder":
            edit_state(made, lambda state: state.update({"decoder.x": torch.zeros(1)}))
        case "other peer":
            edit_state(made, lambda state: [state.pop(name) for name in list(state) if name.startswith("codi.")])
        case "missing shard":
            shards[0].unlink()
        case "swapped shards":
            first = shards[0].read_bytes()
            shards[0].write_bytes(shards[1].read_bytes())
            shards[1].write_bytes(first)
        case "broken shard":
            shards[0].write_bytes(shards[0].read_bytes()[:-5])
        case "index":
            (made.checkpoint / "model.safetensors.index.json").write_text("{}")
        case "shard elsewhere":
            path = made.checkpoint / "model.safetensors.index.json"
            path.write_text(path.read_text().replace(shards[0].name, f"../{shards[0].name}"))
        case "two checkpoints":
            path = made.checkpoint / "pytorch_model.bin"
            path.rename(made.checkpoint / "checkpoint_1")
            (made.checkpoint / "checkpoint_2").write_bytes(b"")
        case "no weights":
            (made.checkpoint / "pytorch_model.bin").unlink()
        case "other vocabulary":
            tiny.edit_json(made.base / "config.json", vocab_size=39)
        case "marker elsewhere":
            words = tiny.tokenizer().__class__.from_pretrained(made.base)
            words.add_tokens(["<|bot|>"])
            words.save_pretrained(made.base)


DAMAGED = {
    "half a pair": r"adapter of transformer\.h\.0\.attn\.c_attn is incomplete",
    "other rank": r"adapter of transformer\.h\.0\.attn\.c_attn has shapes",
    "other layer": r"is for a weight of shape \[32, 64\], not \[32, 96\]",
    "no layer": "the base has no such layer",
    "half a projection": r"it has no tensor prj\.3\.bias",
    "decoder": "`simcot-codi` drops SIM-CoT's auxiliary decoder",
    "other peer": "not a checkpoint of CODI",
    "missing shard": "is missing",
    "swapped shards": "the shard and its index disagree about",
    "broken shard": "not a readable safetensors file",
    "index": "it has no weight_map",
    "shard elsewhere": "a shard must be beside its index",
    "two checkpoints": "several checkpoints, name one of them: checkpoint_1, checkpoint_2",
    "no weights": "it has no weights",
    "other vocabulary": "43 embeddings, this base 39 and three markers",
    "marker elsewhere": "cannot get the id 40|at id",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, tmp_path):
    """One clear error each, and nothing is written."""
    made = published.codi(tmp_path, shards="shard" in case or case == "index")
    damage(made, case)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SLRError, match=DAMAGED[case]) as caught:
        convert(made, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (2, {"lora_alpha": None}, "--lora-alpha is needed: alpha of its LoRA adapter"),
        (2, {"lora_alpha": -1.0}, "--lora-alpha must be above 0"),
        (0, {}, "--lora-alpha says nothing about this codi checkpoint"),
        (2, {"latents": None}, "--latents is needed"),
        (2, {"iterations": 3}, "--iterations says nothing"),
    ],
)
def test_options(rank, options, message, tmp_path):
    with pytest.raises(SLRError, match=message):
        convert(published.codi(tmp_path, rank=rank), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
