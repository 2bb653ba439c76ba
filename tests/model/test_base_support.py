import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from slr_core.errors import ConfigError
from slr_core.model.base_support import (
    attention_mask,
    attention_window,
    check_supported,
    describe_tokenizer,
    end_tokens,
    hidden_size,
    max_positions,
)
from tests import tiny

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mistral(**options):
    return MistralForCausalLM(MistralConfig(**SIZES, **options))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bases_with_full_attention_and_a_plain_head_are_taken(kind):
    check_supported(tiny.base(kind))
    check_supported(mistral(sliding_window=None))


def test_a_window_is_the_most_positions():
    for made, window in ((mistral(sliding_window=8), 8), (tiny.base("gemma3"), 16), (tiny.base(), None)):
        check_supported(made)
        assert attention_window(made.config) == window
        assert max_positions(made.config) == (window or made.config.max_position_embeddings)
    short = mistral(sliding_window=4096, max_position_embeddings=32)
    assert max_positions(short.config) == 32


def test_windows_without_a_width_are_refused():
    windowed = tiny.base("qwen3")
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    for width in (None, 1):
        windowed.config.sliding_window = width
        with pytest.raises(ConfigError, match="Qwen3ForCausalLM: layers without full attention"):
            check_supported(windowed)


def test_a_window_that_no_layer_uses_is_no_window():
    made = tiny.base("qwen3")
    made.config.sliding_window = 8
    made.config.layer_types = ["full_attention"] * 2
    check_supported(made)
    assert attention_window(made.config) is None


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_head_that_is_not_linear_is_refused(cap):
    made = Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 2, final_logit_softcapping=cap)
    )
    if cap is None:
        check_supported(made)
    else:
        with pytest.raises(ConfigError, match="final_logit_softcapping"):
            check_supported(made)


@pytest.mark.parametrize("field", ["logit_scale", "logits_scaling"])
def test_a_scaled_head_is_refused(field):
    made = tiny.base()
    setattr(made.config, field, 1.0)
    check_supported(made)
    setattr(made.config, field, 0.5)
    with pytest.raises(ConfigError, match=field):
        check_supported(made)


def test_an_attention_that_takes_no_mask_of_ours_is_replaced():
    made = tiny.base()
    made.config._attn_implementation = "flex_attention"
    check_supported(made)
    assert made.config._attn_implementation == "sdpa"
    made.set_attn_implementation("eager")
    check_supported(made)
    assert made.config._attn_implementation == "eager"


def test_masks_are_boolean_for_sdpa_and_added_for_eager():
    made, mask = tiny.base(), torch.tensor([[[True, False]], [[True, True]]])
    assert torch.equal(attention_mask(made, mask, torch.float32), mask[:, None])
    made.set_attn_implementation("eager")
    added = attention_mask(made, mask, torch.float16)
    assert (added.shape, added.dtype) == ((2, 1, 1, 2), torch.float16)
    assert added.flatten().tolist() == [0, torch.finfo(torch.float16).min, 0, 0]


def test_the_hidden_size_is_the_embeddings_width():
    assert [hidden_size(tiny.base(kind)) for kind in tiny.KINDS] == [32] * len(tiny.KINDS)


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})])
def test_what_the_base_generates_with_ends_a_text(configured, expected):
    made = tiny.base()
    made.generation_config.eos_token_id = configured
    assert end_tokens(made, tiny.tokenizer()) == expected
    made.generation_config = None
    assert end_tokens(made, tiny.tokenizer()) == {tiny.EOS}


def _bpe(merges):
    pieces = ("a", "b", "c", "ab", "bc", "abc")
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_tokenizer_is_described_by_what_it_does():
    def changed(change):
        made = copy.deepcopy(tiny.tokenizer())
        change(made)
        return describe_tokenizer(made)

    plain = describe_tokenizer(tiny.tokenizer())
    assert changed(lambda made: made(["w1", "w2 w3"], padding=True, truncation=True, max_length=2)) == plain
    assert changed(lambda made: setattr(made, "chat_template", "{{ messages }}")) == plain
    for name, change in {
        "normalizer": lambda made: setattr(made.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        "pre_tokenizer": lambda made: setattr(made.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
        "added_tokens": lambda made: made.add_tokens(AddedToken("w7", lstrip=True)),
        "special_tokens": lambda made: setattr(made, "eos_token", "w7"),
    }.items():
        assert name in {part for part, value in changed(change).items() if value != plain[part]}


def test_tokenizers_of_one_vocabulary_are_told_apart_by_their_merges():
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    one, other = _bpe(merges), _bpe([merges[1], merges[0], ("a", "bc")])
    assert one.get_vocab() == other.get_vocab()
    assert describe_tokenizer(one) != describe_tokenizer(other)


def test_without_a_fast_form_a_tokenizer_is_described_by_its_vocabulary():
    slow = SimpleNamespace(special_tokens_map={"eos_token": "b"}, get_vocab=lambda: {"a": 0, "b": 1})
    assert describe_tokenizer(slow) == {
        "class": "SimpleNamespace",
        "special_tokens": {"eos_token": "b"},
        "vocabulary": {"a": 0, "b": 1},
    }
