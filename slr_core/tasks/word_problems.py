"""GSM8K and its family: word problems whose answer is a number. One reader, one comparison for all of them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any, ClassVar

from slr_core.tasks.base import Card, Example, HubSplit, Task
from slr_core.tasks.reading import number, reference_number, stated_number, statement

_TOLERANCE = Fraction(1, 1000)
GRADING = (
    "the number stated as the answer ('#### 72', '### 72', \\boxed{72}, 'the answer is 72'), else the last number of "
    "the text (CODI); another question or turn of a chat after it does not count; within 1e-3 of the right one (PAL), "
    "or within 1e-3 of its size where that is below 1. Currency and units do not count; a comma separates thousands "
    "before groups of three digits, else the numbers of a list: 1,5 is no number; 20 % is 20 or 0.2, 4 million is 4 "
    "or 4,000,000; number words are not read"
)
"""How all word problems are graded, for their cards."""


def close(value: Fraction, gold: Fraction) -> bool:
    """Whether a number counts as the right one: within 1e-3, relative to it where it is below 1.

    The absolute bound alone, as published, would let 0 pass for GSM-Hard's smallest answers (2e-06).
    """
    return abs(value - gold) <= _TOLERANCE * min(Fraction(1), abs(gold))


class WordProblem(Task):
    """A number is asked for."""

    def check_example(self, example: Example) -> None:
        """The reference answer must be a number.

        Raises:
            DataError: it is not.
        """
        reference_number(example)

    def extract(self, text: str) -> str | None:
        """The stated number, see :func:`~slr_core.tasks.reading.stated_number`."""
        found = stated_number(text)
        return found.text if found else None

    def vote(self, text: str) -> Hashable | None:
        """The value of the stated number; else the words of the statement."""
        found = stated_number(text)
        return found.values if found is not None and found.values else self.extract(text)

    def grade(self, example: Example, text: str) -> bool:
        """Numeric comparison, see :func:`close`.

        Raises:
            DataError: the reference answer is not a number.
        """
        gold, found = reference_number(example), stated_number(text)
        return found is not None and any(close(value, gold) for value in found.values)


class GSM8K(WordProblem):
    """Grade-school word problems, 2 to 8 steps."""

    name = "gsm8k"
    hub: ClassVar[Mapping[str, HubSplit]] = {s: HubSplit("openai/gsm8k", "main", s) for s in ("train", "test")}
    card = Card(
        origin="Cobbe et al. 2021 (arXiv 2110.14168); openai/grade-school-math",
        licence="MIT",
        splits={
            "train": "7,473",
            "test": "1,319",
            "gsm8k_aug/valid": "500 questions of train, in equations",
            "gsm8k_aug/train_noaug_eq": "6,884 of train in equations: not GSM8K-Aug (385,620), which is not obtainable",
        },
        grading=GRADING,
        known_faults=(
            "published latent reasoners train on GSM8K-Aug: figures from other training data do not compare",
            "89 training questions have no annotated equation",
        ),
    )

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``question`` and ``answer``: solution lines with ``<<equation=value>>``, then ``#### answer``."""
        solution, _, answer = str(row["answer"]).rpartition("####")
        lines = [line.strip() for line in re.sub(r"<<[^>]*>>", "", solution).splitlines()]
        return Example(
            str(row["question"]),
            tuple(line for line in lines if line),
            answer.strip().replace(",", ""),
            {"eq_steps": re.findall(r"<<[^>]*>>", solution), "answer_raw": answer.strip()},
        )


class GSMHard(WordProblem):
    """GSM8K's test questions with large numbers in them."""

    name = "gsm_hard"
    hub: ClassVar[Mapping[str, HubSplit]] = {"test": HubSplit("reasoning-machines/gsm-hard", None, "train")}
    card = Card(
        origin="Gao et al. 2022 (PAL, arXiv 2211.10435): one number of each GSM8K test question replaced",
        licence="MIT",
        splits={"test": "1,319 (the hub calls it train); no steps"},
        grading=GRADING,
        known_faults=(
            "the numbers were replaced without regard to sense: eggs are sold in negative numbers, people in fractions",
            "303 answers are floats as a program printed them; 26 are below 1e-4",
            "the questions are those of GSM8K's test split",
        ),
    )

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``input`` and ``target``, a float."""
        return Example(str(row["input"]), (), plain(row["target"]))


class SVAMP(WordProblem):
    """One-step problems varied so that keywords mislead."""

    name = "svamp"
    hub: ClassVar[Mapping[str, HubSplit]] = {s: HubSplit("ChilleD/SVAMP", None, s) for s in ("train", "test")}
    card = Card(
        origin="Patel et al. 2021 (arXiv 2103.07191); arkilpatel/SVAMP",
        licence="MIT",
        splits={"test": "the file: all 1,000, as CODI evaluates; the hub: 300", "train": "the hub: 700"},
        grading=GRADING,
        known_faults=("papers use 300 or 1,000 of the questions: say which",),
    )

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``Body``, ``Question``, ``Equation``, ``Answer``, ``Type``, ``ID``."""
        body = str(row["Body"]).strip()
        answer = plain(row["Answer"])
        return Example(
            f"{body}{'' if body.endswith('.') else '.'} {str(row['Question']).strip()}",
            (f"{str(row['Equation']).strip()} = {answer}",),
            answer,
            {"id": row["ID"], "type": row["Type"]},
        )


class MultiArith(WordProblem):
    """Problems of two or more operations."""

    name = "multiarith"
    hub: ClassVar[Mapping[str, HubSplit]] = {s: HubSplit("ChilleD/MultiArith", None, s) for s in ("train", "test")}
    card = Card(
        origin="Roy and Roth 2015 (arXiv 1608.01413), as collected in MAWPS",
        licence="CC BY 4.0",
        splits={"test": "the file: all 600; the hub: 180", "train": "the hub: 420"},
        grading=GRADING,
        known_faults=("papers use 180, 500 or 600 of the questions: say which", "no steps"),
    )

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``question`` and ``final_ans``."""
        return Example(str(row["question"]).strip(), (), plain(row["final_ans"]))


class ASDiv(WordProblem):
    """Problems of many kinds; one in seventeen asks for a word, a time or a ratio instead of a number."""

    name = "asdiv"
    hub: ClassVar[Mapping[str, HubSplit]] = {"validation": HubSplit("EleutherAI/asdiv", None, "validation")}
    card = Card(
        origin="Miao et al. 2020 (arXiv 2106.15772); chaochun/nlu-asdiv-dataset",
        licence="CC BY-NC 4.0: evaluation only",
        splits={"test": "the file: 2,215 of 2,305", "validation": "the hub: 2,305"},
        grading=GRADING + ". A time or ratio must be written alike; words must open the statement of the answer",
        known_faults=(
            "of the file's 2,215 answers, 129 are no plain number: 59 words, 61 times or ratios, 9 fractions",
            "the hub's split has 90 questions more; those with several answers ('5; 3') are never graded right",
        ),
    )

    def check_example(self, example: Example) -> None:
        """Any answer can be compared: there are words, times and ratios among them."""

    def extract(self, text: str) -> str | None:
        """The stated number, time or ratio; where there is none, the statement itself."""
        return super().extract(text) or _words(text) or None

    def grade(self, example: Example, text: str) -> bool:
        """As for all numbers; times and ratios are compared as written, words where the statement opens."""
        gold = example.answer
        if number(gold) is not None:
            return super().grade(example, text)
        if re.fullmatch(r"\d+(?::\d+)+", gold):
            found = stated_number(re.sub(r"(?<=\d) ?: ?(?=\d)", ":", text))
            return found is not None and found.text == gold
        said, wanted = _plain_words(_words(text)), _plain_words(gold)
        opens = said == wanted or said.startswith(wanted + " ")
        hedged = re.search(r"\b(?:or|not|nor)\b", said[len(wanted) :]) if wanted not in ("yes", "no") else None
        return opens and hedged is None

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """``body``, ``question``, ``answer`` with its unit in brackets, ``formula``, ``solution_type``."""
        raw = str(row["answer"]).strip()
        leading = re.match(r"-?[\d.]+(?:e-?\d+)?(?=\s*\(|$)", raw)
        return Example(
            f"{str(row['body']).strip()} {str(row['question']).strip()}".strip(),
            (str(row["formula"]),),
            leading.group() if leading else raw,
            {"answer_raw": raw, "solution_type": row["solution_type"]},
        )


def plain(value: Any) -> str:
    """A number as the data files write it: whole numbers without a point."""
    text = str(value).strip()
    exact = number(text)
    return str(int(exact)) if exact is not None and exact.denominator == 1 else text


def _words(text: str) -> str:
    where = statement(text)
    lines = where.words.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _plain_words(text: str) -> str:
    words = re.sub(r"[^\w' ]+", " ", text.casefold().replace("\u2019", "'")).split()
    return " ".join(words[1:] if words[:1] == ["the"] else words)
