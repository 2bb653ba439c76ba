"""Question-and-answer data of any kind: the task ``text``. It needs no code of one's own.

``text`` compares the stated answer with the reference answer. ``text:contains``, ``text:number``, ``text:choice`` and
``text:regex=PATTERN`` compare otherwise, see :class:`TextTask`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable
from fractions import Fraction

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, Task
from slr_core.tasks.reading import ANY_TEXT, first_answer, reference_number, stated_number, statement
from slr_core.tasks.word_problems import close

GRADINGS = ("exact", "contains", "number", "choice", "regex=PATTERN")
"""How the task ``text`` compares answers; ``exact`` is the default."""

_INLINE_MARK = re.compile(r"(?:^|\s)#+[ \t]+(?=\S)")
_DECORATION = " \t\"'`*_()[]{}«»“”‘’"
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|[-+]?\.\d+")
_LABEL = re.compile(r"(?<![^\W_])\(?([A-Za-z])(?:\)|(?![\w'’]))")
_LABEL_ALONE = re.compile(r"\W*([A-Za-z])\W*")


class TextTask(Task):
    """Questions and answers from a JSON-lines file, graded by comparing texts.

    Args:
        grading: ``exact``: the answers are equal after :func:`normalize`, or are numbers of equal value.
            ``contains``: the reference answer occurs in the text as whole words. ``number``: as the task gsm8k.
            ``choice``: the label of a multiple-choice option, or its text where examples have a field ``choices``
            (a list of strings). ``regex=PATTERN``: as ``exact``, the answer being the last match of the regular
            expression, or its first group where it has one.

    Raises:
        ConfigError: there is no such grading, or the pattern is not a regular expression.
    """

    name = "text"
    card = Card(
        origin="a file of one's own",
        licence="that of the file",
        splits={},
        grading="exact (default): the stated answer ('#### Paris', 'the answer is Paris', else the last line) equals "
        "the reference answer; case, surrounding punctuation, a leading article and spacing do not count, numbers are "
        "compared by value. contains: the reference answer occurs in the text as whole words. number: as gsm8k. "
        "choice: the label of the option, or its text. regex=PATTERN: exact, on what the pattern finds",
        known_faults=("contains accepts an answer that also names others, such as 'Paris or London'",),
    )

    def __init__(self, grading: str = "exact") -> None:
        self.grading, _, pattern = grading.partition("=")
        self.pattern: re.Pattern[str] | None = None
        if grading not in GRADINGS[:-1] and not (self.grading == "regex" and pattern):
            raise ConfigError(f"the task text has no grading {grading!r}; it has {', '.join(GRADINGS)}")
        if pattern:
            try:
                self.pattern = re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"text:regex={pattern}: not a regular expression ({error})") from error
        if grading != "exact":
            self.name = f"text:{grading}"

    def extract(self, text: str) -> str | None:
        """The stated answer as written; with ``contains`` the whole text."""
        if self.pattern is not None:
            found = list(self.pattern.finditer(first_answer(text, ANY_TEXT)))
            return found[-1][min(1, self.pattern.groups)] if found else None
        if self.grading == "number":
            stated = stated_number(text)
            return stated.text if stated else None
        if self.grading == "choice":
            return _stated_label(_stated(text)) or _stated(text) or None
        return (first_answer(text, ANY_TEXT).strip() if self.grading == "contains" else _stated(text)) or None

    def vote(self, text: str) -> Hashable | None:
        """The stated answer as the grading compares it: the value of a number, else a normalized text."""
        answer = self.extract(text)
        if answer is None:
            return None
        if self.grading == "number":
            stated = stated_number(text)
            return stated.values if stated else None
        value = _plain_number(answer)
        return normalize(answer) if value is None else value

    def grade(self, example: Example, text: str) -> bool:
        """See the class.

        Raises:
            DataError: the reference answer is not one of the kind that the grading compares.
        """
        self.check_example(example)
        if self.grading == "number":
            gold, found = reference_number(example), stated_number(text)
            return found is not None and any(close(value, gold) for value in found.values)
        if self.grading == "choice":
            return _choice(example, text) == _gold_choice(example)
        answer = self.extract(text)
        if answer is None:
            return False
        return _occurs(example.answer, answer) if self.grading == "contains" else _equal(example.answer, answer)

    def check_example(self, example: Example) -> None:
        """The reference answer must not be empty; with ``number`` a number, with ``choice`` a choice.

        Raises:
            DataError: it is something else.
        """
        if not example.answer.strip():
            raise DataError("the reference answer is empty")
        if self.grading == "number":
            reference_number(example)
        if self.grading == "choice":
            _gold_choice(example)


def normalize(text: str) -> str:
    """A text for comparison: Unicode NFKC, case folded, single spaces, no surrounding punctuation or leading article.

    A text of punctuation alone keeps it.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())
    bare = folded.lstrip(_DECORATION).rstrip(_DECORATION + ".,;:!?")
    return re.sub(r"^(?:the|an?) (?=\S)", "", bare) or folded


def _stated(text: str) -> str:
    # A chain of thought and its answer may share a line: "2 + 2 is 4. # 4".
    where = statement(text, ANY_TEXT)
    lines = where.words.strip().splitlines()
    line = lines[-1] if lines else ""
    return line[[0, *(mark.end() for mark in _INLINE_MARK.finditer(line))][-1] :].strip()


def _equal(gold: str, answer: str) -> bool:
    values = _plain_number(gold), _plain_number(answer)
    if None not in values:
        return values[0] == values[1]
    return normalize(gold) == normalize(answer)


def _plain_number(text: str) -> Fraction | None:
    bare = normalize(text.replace("\u2212", "-"))
    found = _PLAIN_NUMBER.fullmatch(bare)
    return Fraction(found.group().replace(",", "")) if found and len(bare) <= 400 else None


def _occurs(gold: str, text: str) -> bool:
    wanted, read = normalize(gold), normalize(text)
    before = r"(?<!\w)(?<!\d[.,])" + (r"(?<!-)" if wanted[0].isdigit() else "")
    return re.search(rf"{before}{re.escape(wanted)}(?!\w|[.,]\d)", read) is not None


def _choices(example: Example) -> list[str]:
    choices = example.extra.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError("the field choices must be a list of strings")
    return [normalize(choice) for choice in choices]


def _gold_choice(example: Example) -> str:
    """The label of the right option, ``A`` for the first.

    Raises:
        DataError: the reference answer is neither a label nor one of ``choices``.
    """
    choices, label = _choices(example), _LABEL_ALONE.fullmatch(example.answer)
    if normalize(example.answer) in choices:
        return chr(ord("A") + choices.index(normalize(example.answer)))
    if label and (not choices or ord(label[1].upper()) - ord("A") < len(choices)):
        return label[1].upper()
    raise DataError(
        f"the reference answer {example.answer[:80]!r} is not a choice: expected the label of an option, such as B, "
        "or one of the field choices; other answers are for the task text"
    )


def _choice(example: Example, text: str) -> str | None:
    stated = _stated(text)
    named = {chr(ord("A") + i) for i, choice in enumerate(_choices(example)) if choice and _occurs(choice, stated)}
    # The label decides; the text of an option where no label is given.
    label = _stated_label(stated)
    if label is None and len(named) == 1:
        return named.pop()
    return label


def _stated_label(stated: str) -> str | None:
    """The one label of an option in a statement, such as ``B``, ``(b)`` or ``B) Paris``; None for none or several."""
    if alone := _LABEL_ALONE.fullmatch(stated):
        return alone[1].upper()
    if opening := re.match(r"\W*([A-Za-z])[).:]", stated):
        return opening[1].upper()
    # A lower-case letter, "a" above all, and "I" are words inside a sentence, unless in brackets.
    found = {m[1].upper() for m in _LABEL.finditer(stated) if m[0].startswith("(") or (m[1].isupper() and m[1] != "I")}
    if len(found) > 1 and re.match(r"A (?!(?:or|and|nor)\b)", stated):
        found.discard("A")  # "A good answer is B"
    return found.pop() if len(found) == 1 else None
