import copy

import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from slr_core.checkpoint.base_model import load_tokenizer
from slr_core.checkpoint.tokenizer_patterns import _fault
from slr_core.errors import CheckpointError
from tests import tiny
from tests.cost import growth

WIDELY_USED = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll"
    r"|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "groups of digits": r"\d{1,3}(?=(?:\d{3})*\b)",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "ours": r" ?\w+| ?[^\w\s]|\s",
}
HOSTILE = (
    r"(a+)+$",
    r"(?:a*)*b",
    r"(?<x>a|aa)+$",
    r"(?:a?){30}a{30}",
    r"((a{1,30}){1,30}){1,30}",
    r"(?:\p{L}+[\])]*){2,}",
    r"[)](?:x(?:a[(]+)b)*+",
    r"a++*",
    r"(a*)\1\1\1",
    r"(?<r>a\g<r>?)",
    "(?x)(a+ #)\n)+",
    r"(a+\c))+",
    "a" * 10_001,
)


@pytest.fixture
def load(tmp_path):
    """Loads a tokenizer with other parts."""

    def with_parts(**parts):
        made = copy.deepcopy(tiny.tokenizer())
        for name, part in parts.items():
            setattr(made.backend_tokenizer, name, part)
        made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path, 40)

    return with_parts


def test_widely_used_patterns(load):
    assert {name: _fault(pattern, float("inf")) for name, pattern in WIDELY_USED.items()} == dict.fromkeys(WIDELY_USED)
    load(pre_tokenizer=pre_tokenizers.Split(Regex(WIDELY_USED["llama 3"]), "isolated"))


def test_hostile_patterns(load):
    assert [pattern for pattern in HOSTILE if _fault(pattern, float("inf")) is None] == []
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(
        CheckpointError, match=r"its pre_tokenizer has the pattern '\(a\+\)\+\$', which may take too lo"
    ):
        load(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split]))
    with pytest.raises(CheckpointError, match="its normalizer has"):
        load(normalizer=normalizers.Replace(Regex("(a|b)*c"), ""))


def test_decoder_patterns(load):
    load(decoder=decoders.Sequence([decoders.Replace(Regex(r"\.(?=\w)"), ". "), decoders.Replace(Regex(" ?#"), "#")]))
    for pattern in ("a*b", "a{0,32}b{0,32}c"):
        with pytest.raises(CheckpointError, match=r"its decoder has .* more than 1024 ways"):
            load(decoder=decoders.Replace(Regex(pattern), "x"))


@pytest.mark.parametrize("piece", ["(", "(?#", "[", "\\p{", "\\x{0", "(?<a", "a{1,", "((a+)+"])
def test_cost_is_linear(piece):
    assert growth(lambda size: _fault(piece * (size // len(piece)), 1024), 1_250, 8) < 3
