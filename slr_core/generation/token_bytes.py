"""Raw bytes of tokens: what each token adds to the UTF-8 text, also where a character is split over tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from slr_core.panics import panics_as_errors

_CONTEXT = 8
"""Tokens before a token that may decide how it decodes: whether a blank comes first, for instance."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> list[bytes]:
    """What each token adds to the text.

    Concatenated, the bytes are the UTF-8 form of ``tokenizer.decode(ids, skip_special_tokens=True)``. Where the
    tokens do not form valid UTF-8, decoding shows U+FFFD and the bytes are the tokens' own. A special token adds
    nothing.

    Args:
        tokenizer: of any kind; its decoder must only append to the text of earlier tokens.
        ids: the tokens.
        before: the tokens that come before them, from the start of the text.
    """
    decoders = set(_decoder_types(tokenizer))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, history = [], list(before)
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if token in special or not isinstance(piece, str):
            found.append(b"")
        elif "ByteLevel" in decoders:
            found.append(_byte_level(piece))
        else:
            found.append(_added(tokenizer, history, token, _fallback_byte(piece, decoders)))
        history.append(token)
    return found


def open_run(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many tokens at the end form a run of single bytes, whose text a later token may still change.

    With byte fallback, a run that is not valid UTF-8 as a whole decodes to U+FFFD throughout. Special tokens, which
    decoding skips, do not end a run.
    """
    decoders = set(_decoder_types(tokenizer))
    if "ByteFallback" not in decoders:
        return 0
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    length = 0
    for count, token in enumerate(reversed(ids), start=1):
        piece = tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and _fallback_byte(piece, decoders) is not None:
            length = count
        elif token not in special:
            break
    return length


def _decoder_types(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Types of the decoders of a fast tokenizer, those inside a sequence included."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # sentencepiece without the fast form of it
        yield "ByteFallback"
    elif backend.decoder is not None:
        state = json.loads(backend.decoder.__getstate__())
        for part in (state, *state.get("decoders", ())):
            yield part["type"]


def _byte_level(piece: str) -> bytes:
    """The bytes that a piece of a byte-level vocabulary stands for; a piece with any other character is plain text."""
    try:
        return bytes(_BYTES[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _byte_letters() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level vocabularies, as GPT-2 introduced them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _fallback_byte(piece: str, decoders: set[str]) -> bytes | None:
    match = _BYTE_PIECE.fullmatch(piece) if "ByteFallback" in decoders else None
    return bytes.fromhex(match[1]) if match else None


def _added(tokenizer: PreTrainedTokenizerBase, history: list[int], token: int, raw: bytes | None) -> bytes:
    """What the decoded text gains by ``token`` after ``history``; ``raw`` is its byte, if it stands for one."""

    def decoded(ids: list[int]) -> str:
        with panics_as_errors():
            return str(tokenizer.decode(ids, skip_special_tokens=True))

    context = history[-_CONTEXT:]
    earlier = decoded(context)
    if not earlier:  # the first tokens of a text decode in their own way
        context, earlier = history, decoded(history)
    text = decoded([*context, token])
    if raw is not None:
        return raw if text != earlier else b""
    return text[len(earlier) :].encode()
