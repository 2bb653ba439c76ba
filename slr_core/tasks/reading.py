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
_LAST_LINE = re.compile(r"(?:^|\n)[ \t]*#{1,3}[ \t]*(?=[^\s#][^\n]*+\s*\Z)")
_STATED = re.compile(rf"{_HASHES.pattern}|\\(?:boxed|fbox)\b|(?i:{_ANSWER_IS.pattern})")
_QUESTION_LABEL = r"[#*_>\t ]{0,9}\b(?:Question|Problem|Exercise|Q)(?: ?#?\d+)?[*_]* ?:"
_QUESTION = re.compile(rf"(?<=\s){_QUESTION_LABEL}")
_QUESTION_LINE = re.compile(rf"\n{_QUESTION_LABEL}")
_UNLABELLED_QUESTION = re.compile(r"\n(?=(?:\S+ +){5,}\S*\?\s*(?:\n|\Z))")
_TURN = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|user)\|>|<\|(?:im_start|start_header_id)\|>(?!assistant)"
    r"|<｜(?:end▁of▁sentence|User)｜>|<end_of_turn>|<start_of_turn>user|</s>|<eos>|\[INST\]"
    r"|(?:^|\n)[#*_>\t ]*(?:User|Human|Instruction)[*_]* ?:|(?:^|\n)#+ *(?:User|Human|Instruction)\b"
)
_TURN_OF_MODEL = re.compile(r"<\|[^|>\n]*\|>|<｜[^｜>\n]*｜>|<start_of_turn>model|<s>|\b[Aa]ssistant\b:?")
_INLINE_HASH = re.compile(r"(?:^|\s)#+\s*\S")
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


ANY_TEXT: Callable[[str], object] = str.strip
"""For answers of any kind: what :func:`statement` is to look for."""


def first_answer(text: str, says: Callable[[str], object] | None = None) -> str:
    """The text without what follows its answer: another turn of a chat, or another question, which a model invents.

    A turn begins with a marker of a chat template or a line ``User:``. A question begins with ``Question:``,
    ``Problem 2:`` or ``Q:``; without a label it is a line after ``#### 72`` that ends with a question mark. It is
    another question only where an answer comes before it: an explicit one (see :func:`statement`), else one in the
    line before it, in which ``says`` finds something.

    Args:
        text: as written.
        says: finds an answer of the kind asked for; ``None``: numbers.
    """
    begin = 0
    for turn in _TURN.finditer(text):
        if _TURN_OF_MODEL.sub("", text[begin : turn.start()]).strip():
            text = text[: turn.start()]
            break
        begin = turn.end()
    stated, question = _STATED.search(text), _QUESTION_LINE.search(text)
    if question and (stated is None or question.start() < stated.start()):
        before = text[: question.start()].strip()
        if _ends_in_answer(before, says):
            return before
    if stated is None:
        return text
    ends = [_QUESTION.search(text, stated.end())]
    if stated.group().startswith("#"):
        unlabelled = _UNLABELLED_QUESTION.search(text, stated.end())
        ends.append(unlabelled if unlabelled and not _doubted(text, unlabelled.end()) else None)
    return text[: min((end.start() for end in ends if end), default=len(text))]


def _ends_in_answer(text: str, says: Callable[[str], object] | None) -> bool:
    """Whether a text without an explicit statement ends in an answer, rather than introduces a question."""
    line = text.rpartition("\n")[2].strip()
    if says is ANY_TEXT:  # a marked line, or a few words and nothing else
        answered = bool(_INLINE_HASH.search(line)) or (line == text and 1 <= len(line.split()) <= 5)
    else:
        answered = bool((says or numbers)(line))
    return answered and not line.endswith(":")


def _doubted(text: str, begin: int) -> bool:
    """Whether a line questions the answer itself."""
    line = text[begin:].partition("\n")[0]
    return bool(_RETRACTED.search(line) or re.search(r"\b(?:right|correct|sure)\b", line, re.I))


def statement(text: str, says: Callable[[str], object] | None = None) -> Statement:
    """The last explicit statement of an answer, or else the whole text; see also :func:`first_answer`.

    Explicit are: what follows ``####`` on its line; a last line that begins with one to three ``#``; the
    content of ``\\boxed``; what follows "answer is" or "answer:" in its sentence. The last one counts.
    A statement that the text then takes back ("wait, ...") counts no more where something of the kind
    asked for follows: what ``says`` finds in it, by default numbers.
    """
    text = tail(first_answer(text, says))
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
_THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)"
_DIGITS = rf"(?:{_THOUSANDS}|\d+)"
_LIST = rf"(?!{_THOUSANDS})\d+(?:\.\d+)?(?:,\d+(?:\.\d+)?)+"  # 1,5: neither 1 nor 5 nor 1.5
_REPETEND = (
    r"(?:\((?P<bracketed>\d+)\)|(?P<lined>(?:\\(?:overline|bar)\s*(?:\{\s*\d+\s*\}|\d)|\d[\u0304\u0305])+)"
    r"|(?P<dotted>(?:\\dot\s*(?:\{\d\}|\d)|\d\u0307)(?:\d*(?:\\dot\s*(?:\{\d\}|\d)|\d\u0307))?))"
)
_REPEATING = re.compile(rf"(?<![\w.])(?P<whole>{_THOUSANDS}|\d*)\.(?P<digits>\d*?){_REPETEND}(?!\d)")
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z_\d])(?<!\d\.)
    (?:
      (?P<clock>\d+(?::\d+)+|{_LIST})                               # 3:30, 5:6 or 1,5: a time, a ratio, a list
    | (?P<sign>(?:(?<=[=:(])[ ]*-[ ]*|(?<![\w.)\]}}])-)(?P<bracket>\()?)?
      (?:
        (?:(?P<whole>\d+)(?:[ ]+and[ ]+|[ ]*))?\\[dt]?frac[ ]*\{{?(?P<over>-?\d+)\}}?[ ]*\{{?(?P<under>\d+)\}}?
      | (?:(?P<mixed>\d+)[ ]+(?:and[ ]+)?)?(?P<top>{_DIGITS})[ ]?/[ ]?(?P<bottom>\d+)(?![\d/]|\.\d)
      | (?P<plain>{_DIGITS}(?:\.\d+)?|\.\d+)(?P<exp>[eE][+-]?\d{{1,3}}(?![\w]))?
        (?:[ ]*(?:\\times|\\cdot|[×*x])[ ]*10[ ]*(?:\^|\*\*)[ ]*\{{?(?P<power>-?\d{{1,3}})\}}?)?
      )
      (?(bracket)\)?)
      (?:[ ]?(?P<percent>\\?%|percent\b|per[ ]cent\b)|[ ](?P<scale>thousand|million|billion|trillion)s?\b)?
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
        values: what it may mean: 20 % is 20 or 0.2, 4 million is 4 (million) or 4,000,000. Empty for times, ratios and
            lists.
    """

    text: str
    start: int
    values: tuple[Fraction, ...]


def as_fractions(text: str) -> str:
    r"""Repeating decimals as fractions: ``0.\overline{3}``, ``0.1\bar 6``, ``0.\dot{1}4\dot{2}`` and ``0.(3)``."""
    return _REPEATING.sub(_as_fraction, text)


def _as_fraction(match: re.Match[str]) -> str:
    whole, digits = match["whole"].replace(",", "") or "0", match["digits"]
    repeated = re.sub(r"\D", "", match["bracketed"] or match["lined"] or match["dotted"])
    if len(whole + digits + repeated) > 100:
        return match.group()
    shift, period = 10 ** len(digits), 10 ** len(repeated) - 1
    value = Fraction(int(whole + digits) * period + int(repeated), shift * period)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def tidy(text: str) -> str:
    """Take out what only dresses numbers up: currency signs, emphasis, LaTeX spacing, typographic forms."""
    for char in set(text):
        if unicodedata.decomposition(char).startswith("<fraction>"):
            text = text.replace(char, " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/"))
    text = text.replace("\u2212", "-").replace("\u2013", "-").replace("\u00d7", "*").replace("\u2044", "/")
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3})", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!\s*|\\,\s?|\\!\s?)(?=\d{3})", ",", text)
    text = re.sub(r"\\(?:left|right|[!,;: ]|text(?:bf)?\{\s*(?=\d))", " ", text)
    text = as_fractions(text)
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
    before, _, _ = tail(first_answer(text, ANY_TEXT)).strip().rpartition("#" if "#" in text else "\n")
    return re.findall(r"[^\s.#][^.#]*\.?", before)
