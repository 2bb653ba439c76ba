"""Reading the final answer out of what a model wrote: where it is stated, and the numbers in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from slr_core.errors import DataError
from slr_core.tasks.base import Example

_LONGEST = 10_000
_SENTENCE_END = re.compile(r"(?<!\bMrs)(?<!\bM[rs])(?<!\bDr)(?<!\bSt)[.!?](?=\s|$)|\n|$")
_ANSWER_IS = re.compile(r"\banswers?\b[^.\n:=]{0,40}?(?:\b(?:is|are|was|would be|should be)\b|[:=])[\s:*_]*", re.I)
_HASHES = re.compile(r"####+[ \t]*")
_LAST_LINE = re.compile(r"(?:^|\n)[ \t]*#{1,3}[ \t]*(?=[^\s#][^\n]*\s*\Z)")
_RETRACTED = re.compile(r"\b(?:wait|actually|correction|mistake|oops|sorry|no,|let me re)", re.I)


@dataclass(frozen=True)
class Statement:
    """Where a text states its answer.

    Attributes:
        words: the statement.
        marked: whether the text marked it as its answer.
        rest: what follows it.
    """

    words: str
    marked: bool
    rest: str


def tail(text: str) -> str:
    """The part of a text that is read at all: its last 10,000 characters, where an answer stands."""
    return text[-_LONGEST:]


def statement(text: str, says: Callable[[str], object] | None = None) -> Statement:
    """The last explicit statement of an answer, or else the whole text.

    Explicit are: what follows ``####`` on its line; a last line that begins with one to three ``#``; the
    content of ``\\boxed``; what follows "answer is" or "answer:" in its sentence. The last one counts.
    A statement that the text then takes back ("wait, ...") counts no more where something of the kind
    asked for follows: what ``says`` finds in it, by default numbers.
    """
    text = tail(text)
    found: list[tuple[int, Statement]] = []
    if hashes := list(_HASHES.finditer(text)):
        line, _, rest = text[hashes[-1].end() :].partition("\n")
        found.append((hashes[-1].start(), Statement(line, True, rest)))
    if headed := _LAST_LINE.search(text):
        found.append((headed.start(), Statement(text[headed.end() :], True, "")))
    if box := boxed(text):
        found.append((box[1], Statement(box[0], True, text[box[2] :])))
    if said := list(_ANSWER_IS.finditer(text)):
        end = _SENTENCE_END.search(text, said[-1].end())
        stop = end.start() if end else len(text)
        found.append((said[-1].start(), Statement(text[said[-1].end() : stop], True, text[stop:])))
    if not found:
        return Statement(text, False, "")
    last = max(found, key=lambda pair: pair[0])[1]
    if _RETRACTED.search(last.rest) and (says or numbers)(last.rest):
        return Statement(last.rest, False, "")
    return last


def boxed(text: str) -> tuple[str, int, int] | None:
    r"""Content, start and end of the last ``\boxed`` or ``\fbox``; None where there is none, or it is not closed."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not starts:
        return None
    begin, at = starts[-1].start(), starts[-1].end()
    if not text.startswith("{", at):  # \boxed 5
        bare = re.compile(r"[^\s$.,]+").match(text, at)
        return (bare.group(), begin, bare.end()) if bare else None
    depth = 0
    for i in range(at, len(text)):
        escaped = text[i - 1] == "\\"
        depth += (text[i] == "{" and not escaped) - (text[i] == "}" and not escaped)
        if depth == 0:
            return text[at + 1 : i], begin, i + 1
    return None


# -- numbers ---------------------------------------------------------------------------------------------

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z_\d])(?<!\d\.)
    (?:
      (?P<clock>\d+(?::\d+)+)                                    # 3:30, 5:6: a time or a ratio, not a number
    | (?P<sign>(?:(?<=[=:(])[ ]*-[ ]*|(?<![\w.)\]}}])-)\(?)?
      (?:
        (?:(?P<whole>\d+)(?:[ ]+and[ ]+|[ ]*))?\\[dt]?frac[ ]*\{{?(?P<over>-?\d+)\}}?[ ]*\{{?(?P<under>\d+)\}}?
      | (?:(?P<mixed>\d+)[ ]+(?:and[ ]+)?)?(?P<top>{_DIGITS})[ ]?/[ ]?(?P<bottom>\d+)(?![\d/]|\.\d)
      | (?P<plain>{_DIGITS}(?:\.\d+)?|\.\d+)(?P<exp>[eE][+-]?\d{{1,3}}(?![\w]))?
        (?:[ ]*(?:\\times|\\cdot|[×*x])[ ]*10[ ]*(?:\^|\*\*)[ ]*\{{?(?P<power>-?\d{{1,3}})\}}?)?
      )
      \)?(?:[ ]?(?P<percent>\\?%|percent\b|per[ ]cent\b)|[ ](?P<scale>thousand|million|billion|trillion)s?\b)?
    )
    """,
    re.X | re.I,
)


@dataclass(frozen=True)
class Number:
    """A number as written.

    Attributes:
        text: as written, currency signs and typography removed.
        start: where in the tidied text it begins.
        values: what it may mean: 20 % is 20 or 0.2, 4 million is 4 (million) or 4,000,000. Empty for times and ratios.
    """

    text: str
    start: int
    values: tuple[Fraction, ...]


def tidy(text: str) -> str:
    """Take out what only dresses numbers up: currency signs, emphasis, LaTeX spacing, typographic forms."""
    for char in set(text):
        if unicodedata.decomposition(char).startswith("<fraction>"):
            text = text.replace(char, " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/"))
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\u00d7", "*").replace("\u2044", "/")
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3})", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!\s*|\\,\s?|\\!\s?)(?=\d{3})", ",", text)
    text = re.sub(r"\\(?:left|right|[!,;: ]|text(?:bf)?\{\s*(?=\d))", " ", text)
    text = re.sub(r"\b(?:USD|EUR|GBP|INR|Rs\.?)\s?(?=[-\d.])", "", text)
    return re.sub(r"\\?\$|[€£¥₹]|\*\*|__|`", "", text)


def numbers(text: str) -> list[Number]:
    """All numbers of a text, in order."""
    return [Number(m.group().strip(), m.start(), _values(m)) for m in _NUMBER.finditer(tidy(text))]


def number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else."""
    stripped = tidy(text).strip()
    match = _NUMBER.fullmatch(stripped)
    values = _values(match) if match else ()
    return values[0] if values else None


def stated_number(text: str) -> Number | None:
    """The number that a text gives as its answer.

    In an explicit statement (see :func:`statement`) it is the first number after the last ``=``; without
    an ``=`` the number with which the statement opens; failing that, as in a text without a statement,
    the last number.
    """
    where = statement(text)
    found = numbers(where.words)
    if not found and where.marked:
        found = numbers(where.rest)
        return found[-1] if found else None
    if not found:
        return None
    if where.marked:
        words = tidy(where.words)
        equals = words.rfind("=")
        after = [n for n in found if n.start > equals]
        opening = re.compile(r"[^\w\d]*(?:(?:about|approximately|roughly|exactly|only|approx)\b\W*)?").match(words)
        if equals >= 0 and after:
            return after[0]
        if opening and found[0].start <= opening.end():
            return found[0]
    return found[-1]


def _values(match: re.Match[str]) -> tuple[Fraction, ...]:
    part = match.groupdict()
    if part["clock"] or len(match.group()) > 400:  # so long a number is no answer, and int() refuses it
        return ()
    try:
        if part["over"]:
            value = Fraction(int(part["over"]), int(part["under"])) + int(part["whole"] or 0)
        elif part["top"]:
            value = Fraction(int(part["top"].replace(",", "")), int(part["bottom"])) + int(part["mixed"] or 0)
        else:
            value = Fraction(part["plain"].replace(",", "") + (part["exp"] or ""))
            value *= Fraction(10) ** int(part["power"] or 0)
    except (ValueError, ZeroDivisionError):
        return ()
    if part["sign"]:
        value = -value
    if part["percent"]:
        return value, value / 100
    if part["scale"]:
        return value, value * _SCALES[part["scale"].lower()]
    return (value,)


# -- true or false ---------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\btrue\b\W{0,3}(?:or|/)\W{0,3}false\b\W?", re.I)
_TRUTH = re.compile(r"\b(?:(?P<negated>not|isn't|neither|nor)\s+(?:\w+ly\s+)?)?[*_\"']*\b(?P<word>true|false)\b", re.I)


def stated_truth(text: str) -> str | None:
    """``"True"`` or ``"False"`` as a text states it: the word itself, last in the statement; None without one.

    A repeated "true or false" is no answer, nor is a negated word ("not true"): what is asked for is the word.
    """
    where = statement(text, _TRUTH.search)
    for words in (where.words, where.rest):
        found = list(_TRUTH.finditer(_CHOICE.sub(" ", words)))
        if found:
            return None if found[-1]["negated"] else found[-1]["word"].capitalize()
    return None


def check_truth(example: Example) -> None:
    """Check that the reference answer is ``True`` or ``False``.

    Raises:
        DataError: it is not.
    """
    if example.answer not in ("True", "False"):
        raise DataError(
            f"the reference answer {example.answer[:80]!r} is not True or False: other answers are for the task text"
        )


def reference_number(example: Example) -> Fraction:
    """The reference answer as a number.

    Raises:
        DataError: it is not one.
    """
    value = number(example.answer)
    if value is None:
        raise DataError(
            f"the reference answer {example.answer[:80]!r} is not a number: other answers are for the task text"
        )
    return value


def written_steps(text: str) -> list[str]:
    """The sentences before the answer: before the last ``#``, or without one before the last line."""
    before, _, _ = tail(text).strip().rpartition("#" if "#" in text else "\n")
    return re.findall(r"[^\s.#][^.#]*\.?", before)
