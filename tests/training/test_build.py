import pytest
import torch

from slr_core.model.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.data import mark_ids
from tests.training.recipe import recipe

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


@pytest.mark.parametrize(
    "changes",
    [{"chain_of_thought": False}, {"train": "adapters", "loop": {"lora": {"covers": "all", "kind": "shared"}}}],
)
def test_vocabulary_stays(bundled, changes):
    made = build(recipe(**{**COT, **ANSWERS, **changes}))
    assert len(made.tokenizer) == len(bundled.tokenizer)
    assert made.base.config.vocab_size == bundled.base.config.vocab_size
