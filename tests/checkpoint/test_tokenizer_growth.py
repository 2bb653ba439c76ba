import copy
import re

import pytest
from tokenizers import Regex, decoders, normalizers
from tokenizers.normalizers import NFKD, Lowercase, Prepend, Replace

from slr_core.checkpoint import tokenizer_growth
from slr_core.checkpoint.base_model import load_tokenizer
from slr_core.errors import CheckpointError
from tests import tiny


@pytest.fixture
def load(tmp_path):
    """Loads a tokenizer with other parts."""

    def with_parts(normalizer=None, decoder=None):
        made = copy.deepcopy(tiny.tokenizer())
        if normalizer is not None:
            made.backend_tokenizer.normalizer = normalizer
        if decoder is not None:
            made.backend_tokenizer.decoder = decoder
        made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path, 40)

    return with_parts


PARTS = [
    (Replace(" ", "_"), 1),
    (Replace("ab", "wxyz"), 2),
    (Replace(Regex(" {2,}"), "_"), 2),
    (normalizers.Sequence([Prepend("_"), Replace("a", "b" * 5), NFKD(), Replace("c", "dd"), Lowercase()]), 10),
]


@pytest.mark.parametrize(("normalizer", "growth"), PARTS)
def test_growth(load, normalizer, growth, monkeypatch):
    monkeypatch.setattr(tokenizer_growth, "MAX_GROWTH", growth)
    load(normalizer)
    monkeypatch.setattr(tokenizer_growth, "MAX_GROWTH", growth - 1)
    with pytest.raises(CheckpointError, match=f"its normalizer may make {growth} characters of one"):
        load(normalizer)


def test_growth_of_decoder(load):
    with pytest.raises(CheckpointError, match=re.escape("its decoder may make 8100 characters of one; at most 64")):
        load(decoder=decoders.Sequence([decoders.Replace("a", "b" * 90), decoders.Replace("b", "c" * 90)]))


SPECIAL = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [SPECIAL, {"Sequence": {"id": "A", "type_id": 0}}] + [SPECIAL] * 7,
    "pair": [],
    "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0] * 10, "tokens": ["<pad>"] * 10}},
}
LONG = {
    "its normalizer may make 100000 characters of one": {"normalizer": {"type": "Prepend", "prepend": "a" * 100_000}},
    "its normalizer has 1001 parts": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
    "its post_processor adds 80 tokens to a text": {"post_processor": {"type": "Sequence", "processors": [TEMPLATE]}},
    "an added token has more than 4096 characters": {"added_tokens": [{"content": "a" * 5000}]},
}


@pytest.mark.parametrize("told", LONG)
def test_additions(told, tmp_path):
    tiny.tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tiny.edit_json(tmp_path / "tokenizer.json", **LONG[told])
    with pytest.raises(CheckpointError, match=told):
        load_tokenizer(tmp_path, 40)


def test_character_map():
    texts = b"a\0" + "é".encode() * 70 + b"\0"
    charsmap = list((4).to_bytes(4, "little") + b"trie" + texts)
    assert tokenizer_growth._growth({"type": "Precompiled", "precompiled_charsmap": charsmap}) == 70


def test_expanding_tokenizer_is_not_run(load):
    with pytest.raises(CheckpointError, match="may make 1000000000 characters of one"):
        load(normalizers.Sequence([Replace("a", "a" * 10)] * 9))
