import pytest
import torch

from slr_core.errors import ConfigError
from slr_core.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.prune import prune
from tests import tiny
from tests.training.recipe import recipe

IDS = torch.tensor([[5, 9, 3, 7, 8]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_whole_base_is_kept(kind):
    base = tiny.base(kind)
    heads, inner = base.config.num_attention_heads, base.config.intermediate_size
    torch.testing.assert_close(prune(base, heads, inner)(IDS).logits, base(IDS).logits)


def test_smallest_parts_are_left_out():
    """What has no weights changes nothing: a pruned base without it computes the same."""
    base = tiny.base("qwen2")
    config = base.config
    groups, inner = config.num_key_value_heads, config.intermediate_size
    queries, half = config.num_attention_heads // groups, inner // 2
    with torch.no_grad():
        for i, layer in enumerate(base.model.layers):
            o = layer.self_attn.o_proj.weight
            o.view(len(o), groups, -1)[:, i % groups] = 0
            layer.mlp.down_proj.weight[:, i::2] = 0
    smaller = prune(base, queries * (groups - 1), half)
    torch.testing.assert_close(smaller(IDS).logits, base(IDS).logits)
    assert smaller.num_parameters() < base.num_parameters()


@pytest.mark.parametrize(
    ("kind", "heads", "inner", "message"),
    [
        ("gpt2", 2, 8, "not like those of Llama"),
        ("llama", 3, 8, "num_attention_heads"),
        ("llama", 2, 1000, "intermediate_size"),
    ],
)
def test_refusals(kind, heads, inner, message):
    with pytest.raises(ConfigError, match=message):
        prune(tiny.base(kind), heads, inner)


def test_pruned_base_is_saved(tmp_path):
    sizes = {"num_attention_heads": 2, "intermediate_size": 96}
    made = build(recipe(base={"from": "prosqa", **sizes}))
    assert made.base.config.hidden_size == 128
    made.save_pretrained(str(tmp_path))
    loaded = LatentReasoner.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.base(IDS).logits, made.base(IDS).logits)
    for base, changes in (
        ({"from": "prosqa", **sizes}, {"loop": None}),
        ({"from": "prosqa", "intermediate_size": 96}, {}),
    ):
        with pytest.raises(ConfigError, match=r"loop is needed|give both"):
            recipe(base=base, **changes)
