r"""MATH: competition problems whose answer is an expression, written in ``\boxed``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from slr_core.errors import DataError
from slr_core.tasks.base import Card, Example, HubSplit, Task
from slr_core.tasks.equivalence import equivalent
from slr_core.tasks.reading import as_fractions, boxed, first_answer, numbers, statement, tail

_HUB = "DigitalLearningGmbH/MATH-lighteval"


class CompetitionMath(Task):
    """The task: equal as written after tidying, or by math-verify; the stated level as difficulty."""

    name = "math"
    needs = ("math_verify", "pebble")
    hub: ClassVar[Mapping[str, HubSplit]] = {
        "train": HubSplit(_HUB, None, "train"),
        "test": HubSplit(_HUB, None, "test"),
        "test500": HubSplit("HuggingFaceH4/MATH-500", None, "test"),
    }
    card = Card(
        origin="Hendrycks et al. 2021 (arXiv 2103.03874); MATH-500: Lightman et al. 2023 (arXiv 2305.20050)",
        licence="MIT; the problems come from contests, and the first hub copy was taken down after a complaint: "
        "evaluate, do not redistribute",
        splits={"train": "7,500 (the file: 7,498)", "test": "5,000", "test500": "500 of test"},
        grading="the last \\boxed before another question or turn of a chat, else what is stated as the answer, else "
        "the last formula, else the last line; equal after the usual tidying (units, \\left, \\dfrac, spaces), or to "
        "math-verify (5 s), and relative to their size: decimals in six significant digits, exact numbers in all. "
        "A comma separates thousands, or the elements of a list: 1,5 is not 1.5",
        known_faults=(
            "two training problems have an empty box and are left out of the file",
            "11 test problems, one of MATH-500, also occur in train",
            "figures depend on the grader by a few points: compare only what the same grader graded",
        ),
    )

    def prompt(self, example: Example) -> str:
        r"""The problem, and that the answer belongs into ``\boxed``: the data has it there, readers look there."""
        return f"{example.question}\nPut your final answer within \\boxed{{}}."

    def extract(self, text: str) -> str | None:
        r"""The content of the last ``\boxed``; without one, the statement, the last formula or the last line."""
        text = tail(first_answer(text))
        if re.search(r"\\(?:boxed|fbox)\b", text):
            box = boxed(text)
            return (box[0].strip() or None) if box else None
        where = statement(text)
        words = where.words.strip()
        formulas = re.findall(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", words, re.S)
        if formulas:
            return "".join(formulas[-1]).strip()
        line = words.splitlines()[-1].strip() if words else ""
        if line.endswith(".") and not line.endswith("\\."):
            line = line[:-1].rstrip()
        prose = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}", re.sub(r"\\[a-z]+\{[^}]*\}", "", line))
        if prose and (found := numbers(line)):
            return found[-1].text
        return line or None

    def grade(self, example: Example, text: str) -> bool:
        """Never raises on account of what was written."""
        answer = self.extract(text)
        return answer is not None and same(example.answer, answer)

    def difficulty(self, example: Example) -> int:
        """The level, 1 to 5; 0 where the data has none."""
        digits = re.search(r"\d+", str(example.extra.get("level", "")))
        return int(digits.group()) if digits else 0

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``problem``, ``solution``, ``level``, ``type`` (MATH-500: ``subject``, ``answer``, ``unique_id``)."""
        solution = str(row["solution"])
        box = boxed(solution)
        answer = str(row["answer"]) if "answer" in row else box[0] if box else ""
        if not answer.strip():
            raise DataError("a row of MATH has no answer: its solution has no box, or an empty one")
        extra = {"solution": solution, "level": row["level"], "type": row.get("type", row.get("subject"))}
        if "unique_id" in row:
            extra["unique_id"] = row["unique_id"]
        return Example(str(row["problem"]), sentences(solution), answer, extra)


def sentences(solution: str) -> tuple[str, ...]:
    """A solution as steps; a full stop within a formula ends none."""
    parts, start, inside = [], 0, False
    for i, char in enumerate(solution):
        if char == "$" and solution[i - 1 : i] != "\\":
            inside = not inside
        if char in ".?!" and not inside and solution[i + 1 : i + 2] in ("", " ", "\n"):
            parts.append(solution[start : i + 1])
            start = i + 1
    return tuple(part.strip() for part in [*parts, solution[start:]] if part.strip())


def same(gold: str, answer: str) -> bool:
    """Whether two answers are the same: as written after :func:`tidied`, or by math-verify.

    Lists, points and intervals are compared element by element: math-verify takes the point (1,2), the
    set {1,2} and the list 1,2 for one thing, and the list 2, 100 for 2,100. A comma separates thousands or the elements
    of a list: 1,5 is the list of 1 and 5, not 1.5.
    """
    gold, answer = as_fractions(gold), as_fractions(answer)
    if [m.groups() for m in _MEANT.finditer(gold)] != [m.groups() for m in _MEANT.finditer(answer)]:
        return False
    # 81,256 may be one number or two.
    readings = {(tidied(gold, joined), tidied(answer, joined)) for joined in (True, False)}
    return any(_same(gold, answer, left, right) for left, right in sorted(readings))


def _same(gold: str, answer: str, left: str, right: str) -> bool:
    if not right:
        return False
    if left == right:
        return True
    if "\\text" in gold and left.isalpha() and len(left) > 1 and right.isalpha():
        return left.casefold() == right.casefold()  # a word, not a product of letters
    bases = [found.group(1) for found in map(_BASE.search, (left, right)) if found]
    if len(set(bases)) > 1:  # math-verify does not look at them
        return False
    if "\\pm" not in left + right:
        (brackets, items), (others, other_items) = _parts(left), _parts(right)
        if brackets != others or len(items) != len(other_items):
            return False
        if brackets:
            return all(same(a, b) for a, b in zip(items, other_items, strict=True))
        if len(items) > 1:
            return _in_some_order(items, other_items)
    return equivalent(gold, answer) or equivalent(left, right)


def _parts(text: str) -> tuple[str, list[str]]:
    # Brackets and elements of a point or an interval; no brackets and the elements of a list or set, one for
    # anything else.
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(_split(text)) == 1:
        inner = _split(text[1:-1])
        if len(inner) > 1 and _balanced(text[1:-1]):
            return text[0] + text[-1], inner
    return "", _split(text)


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _in_some_order(items: list[str], others: list[str]) -> bool:
    rest = list(others)
    for item in items:
        match = next((other for other in rest if same(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


# Words that change what an answer is: they are no unit.
_MEANT = re.compile(r"(?<![a-zA-Z\\])([ap])\.?\s?m\b|\b(hundred|thousand|million|billion|dozen)", re.I)
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
_UNIT = r"\\(?:text|mbox|textrm|mathrm|rm)\s*\{\s*(?:\\?\s)*[a-zA-Z.,\s/\\]+\}(?:\^\{?-?\d\}?)?"


def tidied(answer: str, joined: bool = True) -> str:
    """An answer without what is only dress: spacing, sizes, units, degrees, dollars, a leading ``x =``.

    Commas between thousands go where ``joined``; otherwise they separate the elements of a list.
    """
    text = answer.strip().rstrip(".").replace("\n", " ")
    text = re.sub(r"(?<=\d)(?:,\s*\\!|\{,\})\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[!,;:]|\\(?:q?quad|displaystyle|,)(?![a-zA-Z])|~|\\ ", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r",?\s*\\(?:text|mbox)\s*\{[,\s]*(?:and|or)\s*\}", ",", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\degree|\u00b0", "", text)
    text = re.sub(r"\\?\$|\\?%", "", text)
    text = re.sub(rf"(?<=[\d}})a-z])\s*{_UNIT}\s*$", "", text)
    text = re.sub(r"\\(?:text|mbox|textrm|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    if joined and not re.match(r"\s*[\[({\\]", text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*([^\s{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt\s*([^\s{\\\[])", r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    if text[:1] == "{" and text[-1:] == "}" and _balanced(text[1:-1]):
        text = text[1:-1]
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice
    text = re.sub(r"^\([a-z](?:,[a-z])+\)=(?=.)", "", text)
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?(?:=|\\in)(?=.)", "", text)
    return text
