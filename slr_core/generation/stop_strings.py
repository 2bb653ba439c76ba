"""Finding stop strings in a text that grows, at a cost that depends on what is new in it alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to; at the end of a text, later tokens may replace it."""


class StopStringFinder:
    """Finds the first stop string in the text of an answer.

    Args:
        stops: the strings, none of them empty.
        start: character before which a match does not count.

    Attributes:
        position: where the first match begins; ``None``: there is none.
        begun: number of characters that may begin a match, at the end of the text without its incomplete characters.
    """

    def __init__(self, stops: Sequence[str], start: int = 0) -> None:
        self._stops, self._start = stops, start
        self.position: int | None = None
        self.begun = 0
        self._text = ""
        self._found: list[int | None] = [None] * len(stops)
        self._matched = [0] * len(stops)
        """Of each string that is not found, the length of its longest prefix that ends the text (as in the algorithm
        of Knuth, Morris and Pratt)."""

    def read(self, text: str) -> None:
        """Take the text so far. If it continues that of the last call, only what is new is looked at.

        Otherwise, also as many characters before the change as the longest string has.
        """
        complete = text.rstrip(REPLACEMENT)
        kept = _common_length(self._text, complete)
        if kept < len(self._text):
            self._rewind(complete, kept)
        for i, stop in enumerate(self._stops):
            if self._found[i] is None:
                self._matched[i], end = _match(stop, complete, max(kept, self._start), len(complete), self._matched[i])
                self._found[i] = None if end is None else end - len(stop)
        self._text = complete
        matches = [at for at in (*self._found, *self._in_incomplete(text, len(complete))) if at is not None]
        self.position, self.begun = min(matches, default=None), max(self._matched, default=0)

    def _rewind(self, text: str, length: int) -> None:
        for i, stop in enumerate(self._stops):
            found = self._found[i]
            if found is None or found + len(stop) > length:
                begin = max(self._start, length - len(stop) + 1)
                self._found[i], self._matched[i] = None, _match(stop, text, begin, length, 0)[0]

    def _in_incomplete(self, text: str, complete: int) -> list[int]:
        """Matches that end in the incomplete characters: of strings that hold such a character."""
        if complete == len(text):
            return []
        begins = [(stop, max(self._start, complete - len(stop) + 1, 0)) for stop in self._stops if REPLACEMENT in stop]
        return [at for stop, begin in begins if (at := text.find(stop, begin)) >= 0]


def _match(stop: str, text: str, at: int, end: int, matched: int) -> tuple[int, int | None]:
    """Read ``text[at:end]``, before which ``matched`` characters of ``stop`` have been matched.

    Returns:
        How many are matched after it, and where the first full match ends.
    """
    borders = _borders(stop)
    while at < end:
        if not matched:
            at = text.find(stop[0], at, end)
            if at < 0:
                return 0, None
        letter = text[at]
        while matched and stop[matched] != letter:
            matched = borders[matched - 1]
        matched += stop[matched] == letter
        at += 1
        if matched == len(stop):
            return 0, at
    return matched, None


@lru_cache(maxsize=1024)
def _borders(stop: str) -> tuple[int, ...]:
    """Of each prefix, the length of its longest proper suffix that is a prefix of ``stop``."""
    borders = [0]
    for letter in stop[1:]:
        length = borders[-1]
        while length and stop[length] != letter:
            length = borders[length - 1]
        borders.append(length + (stop[length] == letter))
    return tuple(borders)


def _common_length(first: str, second: str) -> int:
    """Length of the common prefix."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
