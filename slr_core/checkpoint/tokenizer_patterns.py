"""Regular expressions of a tokenizer: those that may take time without end are refused before they are used.

Oniguruma matches by backtracking. A group that is repeated and that can itself match a text in several ways, such as
``(a+)+`` or ``(a|aa)*``, takes time that is exponential in the length of the text. A decoder runs on the engine's
thread; its patterns must have few ways to match at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slr_core.checkpoint.validate import checkpoint_error

MAX_DECODER_WAYS = 1024
"""Ways in which a decoder's pattern may match at one position."""
MAX_PATTERN_CHARACTERS = 10_000
_SHOWN_CHARACTERS = 80
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")
_OPENING = re.compile(r"\((?:\?(?:<?[=!]|[:>~]|<\w+>|'\w+'|[a-zA-Z-]*:))?")
# What is not closed goes to the end, where nobody looks for its end again.
_OPTIONS = re.compile(r"\(\?(?:#[^)]*(?:\)|\Z)|[a-zA-Z-]+\))")
_ESCAPE = re.compile(r"\\(?:[pP]\{[^}]*(?:\}|\Z)|x\{[0-9a-fA-F ]*\}|.)", re.DOTALL)
_BACKREFERENCE = re.compile(r"\\[1-9kg]")
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\[cCM]")
_EXTENDED = re.compile(r"\(\?[a-wyzA-Z-]*x")


@dataclass
class _Group:
    """What a group, or one atom, can match.

    Attributes:
        ways: an upper bound of the number of ways in which it matches at one position.
        variable: whether it can match one text in several ways, or texts of several lengths.
    """

    ways: float = 1
    variable: bool = False

    def add(self, inner: _Group) -> None:
        """Append an atom."""
        self.ways *= inner.ways
        self.variable |= inner.variable


def check_patterns(path: Path, parts: dict[str, Any]) -> None:
    """Refuse patterns of a ``tokenizer.json`` that may take time without end.

    Args:
        path: of the file, for the message.
        parts: its content.

    Raises:
        CheckpointError: there is one.
    """
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for pattern in _patterns(parts.get(name)):
            shown = pattern if len(pattern) <= _SHOWN_CHARACTERS else f"{pattern[:_SHOWN_CHARACTERS]}..."
            fault = _fault(pattern, MAX_DECODER_WAYS if name == "decoder" else math.inf)
            if fault is not None:
                raise checkpoint_error(path, f"its {name} has the pattern {shown!r}, which may take too long: {fault}")


def _patterns(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _patterns(inner)


def _fault(pattern: str, limit: float) -> str | None:
    """Why a pattern is refused; ``None``: it is not. Takes time that is linear in its length."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"it has more than {MAX_PATTERN_CHARACTERS} characters"
    if _CONTROL.search(pattern) or _EXTENDED.search(pattern):
        return "it has control escapes, or the option x"  # which would hide its groups from this function
    groups, last, position = [_Group()], _Group(), 0
    """The open groups, and the last atom of the innermost, which a quantifier may still follow."""
    while position < len(pattern):
        quantifier = _QUANTIFIER.match(pattern, position)
        if quantifier is not None and quantifier[0] != "{}":
            least, most = _bounds(quantifier)
            position = quantifier.end()
            if pattern[position : position + 1] in ("?", "+") and quantifier[0] in "*+?":
                position += 1  # lazy, or possessive
            if most > 1 and last.variable:
                return "what is repeated can match in several ways"
            ways = last.ways * (most - least + 1)
            last = _Group(ways, last.variable or most > least)
            continue
        groups[-1].add(last)
        last = _Group()
        character = pattern[position]
        if _BACKREFERENCE.match(pattern, position):
            return "it refers to one of its groups"
        if skipped := _OPTIONS.match(pattern, position) or _ESCAPE.match(pattern, position):
            position = skipped.end()
        elif character == "[":
            position = _end_of_class(pattern, position)
        elif opening := _OPENING.match(pattern, position):
            groups.append(_Group())
            position = opening.end()
        elif character == ")" and len(groups) > 1:
            last = groups.pop()
            position += 1
        else:
            if character == "|":
                groups[-1].ways += 1
                groups[-1].variable = True
            position += 1
    groups[-1].add(last)
    return None if groups[0].ways <= limit else f"it can match in more than {limit} ways at one position"


def _bounds(quantifier: re.Match[str]) -> tuple[float, float]:
    if quantifier[0] in "*+?":
        return (1 if quantifier[0] == "+" else 0), (1 if quantifier[0] == "?" else math.inf)
    least = int(quantifier[1] or 0)
    if not quantifier[2]:
        return least, least
    return least, int(quantifier[3]) if quantifier[3] else math.inf


def _end_of_class(pattern: str, position: int) -> int:
    """The position behind a character class, which may hold others."""
    depth = 0
    while position < len(pattern):
        character = pattern[position]
        position += 2 if character == "\\" else 1
        if character == "[":
            depth += 1
            if pattern[position : position + 1] == "^":
                position += 1
            if pattern[position : position + 1] == "]":
                position += 1  # the first one stands for itself
        elif character == "]":
            depth -= 1
            if not depth:
                break
    return position
