from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from slr_core.errors import ConfigError
from slr_core.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.data import mark_ids
from tests import tiny
from tests.training.recipe import DATA, recipe

COT = {"base": {"from": "prosqa"}, "loop": None, "max_iterations": 0, "chain_of_thought": True}
ANSWERS = {"objectives": {"answer": 1.0}, "chains": 0}


@pytest.fixture(scope="module")
def bundled():
    return LatentReasoner.from_pretrained("prosqa")


def test_separator_is_added_where_steps_are_written(bundled, tmp_path):
    made = build(recipe(**COT, **ANSWERS))
    token = len(bundled.tokenizer)
    assert mark_ids(bundled.tokenizer) == []
    assert mark_ids(made.tokenizer) == [token]
    text = "Tom is a rompus. # Tom is a rompus."
    ids = made.tokenizer(text, add_special_tokens=False).input_ids
    assert [made.tokenizer.decode([i]).strip() for i in ids] == ["Tom", "is a rompus.", "#", "Tom", "is a rompus."]
    assert made.tokenizer.decode(ids).rpartition("#")[2].strip() == "Tom is a rompus."
    before, after = (x.base.get_input_embeddings().weight for x in (bundled, made))
    torch.testing.assert_close(after[:token], before)
    torch.testing.assert_close(after[token], before.mean(0))
    made.save_pretrained(str(tmp_path / "made"))
    loaded = LatentReasoner.from_pretrained(str(tmp_path / "made"))
    assert mark_ids(loaded.tokenizer) == [token]
    prompt = torch.tensor([ids])
    assert torch.equal(loaded.base(prompt).logits, made.base(prompt).logits)
    assert made.base.config.vocab_size == token + 1


def test_model_from_random_weights_has_the_architecture_of_the_recipe():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 40}
    for model_type in ("llama", "gpt2"):
        made = build(recipe(base={**sizes, "intermediate_size": 24, "model_type": model_type}))
        config = made.base.config
        assert config.model_type == model_type
        assert {name: getattr(config, name) for name in sizes} == sizes
        inner = {
            size
            for name, x in made.base.named_parameters()
            if ".mlp." in name and "lora" not in name
            for size in x.shape
        }
        assert inner == {16, 24}
        assert config.eos_token_id == made.tokenizer.eos_token_id
        drops = [module.p for module in made.base.modules() if isinstance(module, torch.nn.Dropout)]
        assert not any(drops), "answers of one model differ from step to step"


@pytest.mark.parametrize(
    "changes",
    [{"chain_of_thought": False}, {"train": "adapters", "loop": {"lora": {"covers": "all", "kind": "shared"}}}],
)
def test_vocabulary_stays(bundled, changes):
    made = build(recipe(**{**COT, **ANSWERS, **changes}))
    assert len(made.tokenizer) == len(bundled.tokenizer)
    assert made.base.config.vocab_size == bundled.base.config.vocab_size


SOFT = {"projection": {"kind": "expected_embedding"}, "timestep": {"kind": "none"}, "residual": {"source": "none"}}


def test_loop_of_a_chain_ends_at_the_separator(tmp_path):
    """A recipe names the token by its id, which another base has for another token."""
    folder = tmp_path / "cot"
    base = build(recipe(**COT, **ANSWERS))
    base.save_pretrained(str(folder))
    (mark,) = mark_ids(base.tokenizer)

    def made(end_token):
        convergence = {"criterion": "end_token", "end_token_id": end_token}
        loop = {**SOFT, "convergence": convergence}
        text = {"answer_prefix": " # "}
        return build(
            recipe(
                base={"from": str(folder)}, supervised="chain", objectives={"cot": 1.0}, chains=0, loop=loop, text=text
            )
        )

    assert made(mark).config.loop.convergence.end_token_id == mark
    with pytest.raises(ConfigError, match=rf"loop\.convergence\.end_token_id must be {mark}, .* `#` .*, got 7"):
        made(7)


ADAPTER = {"kind": "shared", "covers": "all", "rank": 3, "alpha": 6}
BLOCK = {"workspace": "block", "block_size": 6}


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A latent reasoner without a loop whose one adapter is trained."""
    folder = tmp_path_factory.mktemp("made") / "cot"
    made = build(recipe(base={"from": "prosqa"}, loop={"lora": ADAPTER}, max_iterations=0, train="adapters", **ANSWERS))
    tiny.shake(made)
    made.save_pretrained(str(folder))
    return folder


def keeping(folder, lora=ADAPTER, **changes):
    base = {"from": str(folder), "keep_adapters": True}
    return build(recipe(base=base, loop={**BLOCK, "lora": lora}, objectives={"steps": 1.0}, **changes))


def test_a_new_loop_keeps_adapters(fine_tuned):
    source, made = LatentReasoner.from_pretrained(str(fine_tuned)), keeping(fine_tuned)
    assert made.config.loop.workspace == "block"
    theirs = {name: x for name, x in source.base.named_parameters() if ".lora_" in name}
    ours = {name: x for name, x in made.base.named_parameters() if ".lora_" in name}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(x, ours[name]) for name, x in theirs.items())
    assert any(x.any() for name, x in ours.items() if ".lora_B" in name)
    other = build(recipe(base={"from": str(fine_tuned)}, loop={**BLOCK, "lora": ADAPTER}, objectives={"steps": 1.0}))
    assert not any(x.any() for name, x in other.base.named_parameters() if ".lora_B" in name)


@pytest.mark.parametrize("lora", [{**ADAPTER, "rank": 4}, {**ADAPTER, "alpha": 3}, {"rank": 3}, {"kind": "none"}])
def test_other_adapters_cannot_be_kept(fine_tuned, lora):
    with pytest.raises(ConfigError, match=r"base.keep_adapters: loop.lora must be .*'rank': 3"):
        keeping(fine_tuned, lora)


def test_a_language_model_has_no_adapters_to_keep(fine_tuned):
    with pytest.raises(ConfigError, match=r"base.keep_adapters needs a latent reasoner in base.from"):
        keeping(fine_tuned / "base")


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"use_rslora": True}, {"lora_bias": True}])
def test_kept_adapters_act_as_they_did(fine_tuned, tmp_path, change):
    """Also adapters whose PEFT config says more than loop.lora, as imported ones do."""
    source = LatentReasoner.from_pretrained(str(fine_tuned))
    config = replace(source.adapter_configs["loop_01"], **change)
    base = AutoModelForCausalLM.from_pretrained(fine_tuned / "base")
    other = LatentReasoner(base, source.tokenizer, source.config, {"loop_01": config})
    tiny.shake(other)
    other.save_pretrained(str(tmp_path / "other"))
    made = keeping(tmp_path / "other").eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(made.base(prompt).logits, other.eval().base(prompt).logits, rtol=1e-4, atol=1e-4)


def test_as_many_adapters_must_be_kept(tmp_path):
    loop = {"lora": {"rank": 3}, "trained_iterations": 3}
    build(recipe(loop=loop)).save_pretrained(str(tmp_path / "made"))
    base = {"from": str(tmp_path / "made"), "keep_adapters": True}
    with pytest.raises(ConfigError, match=r"adapters loop_01, loop_02, loop_03, the recipe's loop loop_01, loop_02: "):
        build(recipe(base=base, loop={**loop, "trained_iterations": 2}))


def test_a_loop_without_weights_leaves_adapters_nothing_to_train():
    loop = DATA["loop"] | {"lora": {"kind": "none"}, "timestep": {"kind": "none"}, "residual": {"source": "none"}}
    with pytest.raises(ConfigError, match="train `adapters` leaves nothing to train"):
        build(recipe(train="adapters", loop=loop))
