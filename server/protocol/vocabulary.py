"""Tokens as bytes and text, for responses."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from slr_core.generation.token_bytes import token_bytes


class Vocabulary:
    """Decodes the tokens of one request.

    Args:
        tokenizer: of the loop adapter set that answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._unchosen: dict[tuple[int, bool], bytes] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as one text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def token_bytes(self, ids: Sequence[int], before: Sequence[int] = ()) -> list[bytes]:
        """What each token adds to the text; see :func:`slr_core.generation.token_bytes.token_bytes`."""
        return token_bytes(self._tokenizer, ids, before)

    def unchosen_bytes(self, token_id: int, history: Sequence[int], position: int) -> bytes:
        """What a token would add to the text if it stood at ``position`` of ``history``."""
        # What comes before matters for the first token of a text only, where a leading blank may be dropped.
        key = token_id, position > 0
        if key not in self._unchosen:
            (self._unchosen[key],) = token_bytes(self._tokenizer, [token_id], history[:position])
        return self._unchosen[key]

    def label(self, token_id: int, raw: bytes) -> str:
        """A token as a string: its text; OpenAI's form of bytes for a part of a character (``bytes:\\xf0\\x9f``); the
        name of a token without text."""
        if not raw:
            return str(self._tokenizer.convert_ids_to_tokens(token_id) or token_id_label(token_id))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_id_label(token_id: int) -> str:
    """A token's id as a string, where its text is ambiguous."""
    return f"token_id:{token_id}"


class Offsets:
    """Character offsets of tokens in a text.

    Args:
        start: offset of the first token.
    """

    def __init__(self, start: int) -> None:
        self.next = start
        """Offset of the next token; a character counts once its last byte has come."""
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def advance(self, pieces: Iterable[bytes]) -> Iterator[int]:
        """The offset of each token, given what each adds to the text."""
        for piece in pieces:
            yield self.next
            self.next += len(self._decoder.decode(piece))
