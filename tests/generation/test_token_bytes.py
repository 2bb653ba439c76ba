"""Bytes of tokens, concatenated, are the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slr_core.checkpoint.folder import BUNDLED_FOLDER
from slr_core.generation.token_bytes import token_bytes
from tests import tiny

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(content=" ", left=1, right=0),
]


def fast(model, decoder=None, **special):
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL, **special)


def vocabulary(*pieces):
    return {piece: i for i, piece in enumerate(("<pad>", "<eos>", "<unk>", *pieces))}


def byte_fallback():
    pieces = ("▁a", "a", "▁", "▁▁", "é", *(f"<0x{byte:02X}>" for byte in range(256)))
    return fast(models.BPE(vocabulary(*pieces), [], byte_fallback=True), decoders.Sequence(LLAMA))


def byte_level():
    made = tiny.byte_tokenizer()
    made.add_tokens([AddedToken("€uro"), AddedToken("[x]")])
    made.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return made


TOKENIZERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "word_level": lambda: fast(models.WordLevel(vocabulary("a", "b", "é", "."), "<unk>")),
    "word_piece": lambda: fast(
        models.WordPiece(vocabulary("a", "##b", "##é", ".", "'", "s"), unk_token="<unk>"), decoders.WordPiece()
    ),
    "metaspace": lambda: fast(models.BPE(vocabulary("▁a", "b", "▁", "é"), []), decoders.Metaspace()),
    "suffix": lambda: fast(models.BPE(vocabulary("a</w>", "b", "é</w>"), []), decoders.BPEDecoder()),
    "prosqa": lambda: AutoTokenizer.from_pretrained(BUNDLED_FOLDER / "prosqa"),
    "prontoqa": lambda: AutoTokenizer.from_pretrained(BUNDLED_FOLDER / "prontoqa"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@given(data=st.data())
def test_they_are_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=14))
    split = data.draw(st.integers(0, len(ids)))
    found = token_bytes(tokenizer, ids[:split]) + token_bytes(tokenizer, ids[split:], ids[:split])
    assert len(found) == len(ids)
    assert found == token_bytes(tokenizer, ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    try:
        assert b"".join(found).decode() == text
    except UnicodeDecodeError:  # not a text: only the number of U+FFFD may differ, by how a run of bytes is split
        assert "\ufffd" in text


def test_a_character_split_over_tokens():
    made = byte_level()
    ids = made("a😀b").input_ids
    assert len(ids) == 6
    assert token_bytes(made, ids) == [b"a", *(bytes([byte]) for byte in "😀".encode()), b"b"]
    made = byte_fallback()
    ids = made.convert_tokens_to_ids(["▁a", *(f"<0x{byte:02X}>" for byte in "€".encode()), "▁a"])
    assert token_bytes(made, ids) == [b"a", b"\xe2", b"\x82", b"\xac", b" a"]


def test_bytes_that_are_no_text():
    made = byte_level()
    (lead, _), letter = made("é").input_ids, made("a").input_ids[0]
    assert token_bytes(made, [lead, letter]) == ["é".encode()[:1], b"a"]


def test_special_tokens_add_nothing():
    made = byte_level()
    think, eos = made.convert_tokens_to_ids(["<think>", "<eos>"])
    assert token_bytes(made, [think, *made("a[x]€uro").input_ids, eos]) == [b"", b"a", b"[x]", "€uro".encode(), b""]


def test_the_first_token_has_no_blank():
    made = tiny.tokenizer()
    ids = tiny.ids("w1 w2")
    assert token_bytes(made, ids) == [b"w1", b" w2"]
    assert token_bytes(made, ids, before=[tiny.EOS]) == [b"w1", b" w2"]
    assert token_bytes(made, ids[1:], before=ids[:1]) == [b" w2"]


def test_a_literal_byte_name_is_text_without_byte_fallback():
    made = fast(models.WordLevel(vocabulary("<0x41>"), "<unk>"))
    assert token_bytes(made, [3]) == [b"<0x41>"]


def test_ids_beyond_the_vocabulary_add_nothing():
    assert token_bytes(tiny.tokenizer(), [10**6]) == [b""]
