"""Token ids as text, for responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """Decodes the tokens of one request.

    Args:
        tokenizer: of the loop adapter set that answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.token = cache(lambda token_id: str(tokenizer.decode([token_id])))
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as one text, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
