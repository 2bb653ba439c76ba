"""What every task shares: the example record, reading it from JSON lines, and the task interface."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from slr_core.errors import DataError


@dataclass(frozen=True)
class Example:
    """One question with its reasoning steps and its answer.

    ``extra`` keeps every further field of the source line, untouched: a task reads what it knows
    (ProsQA: ``edges``, ``root``, ...) and writing an example back loses nothing.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as one JSON object, in the order of the data files."""
        return {"question": self.question, "steps": list(self.steps), "answer": self.answer, **self.extra}


class Task(Protocol):
    """A source of questions and the rule that grades their answers."""

    name: str

    def grade(self, example: Example, text: str) -> bool:
        """Whether ``text``, as the model wrote it, answers ``example``."""
        ...

    def baselines(self, example: Example) -> dict[str, float]:
        """Expected score (0 to 1) of each known shortcut rule on ``example``; empty where none is known."""
        ...

    def difficulty(self, example: Example) -> int:
        """The number of reasoning steps that the question needs."""
        ...


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file, one ``{"question", "steps", "answer", ...}`` a line.

    Raises:
        DataError: the file is missing, is not JSON lines, or a line lacks a field (the line is named).
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8").split("\n")  # not splitlines: JSON strings may hold other line separators
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return list(_parse(path, lines))


def _parse(path: Path, lines: Sequence[str]) -> Iterator[Example]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, steps, answer = record.pop("question"), record.pop("steps"), record.pop("answer")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}, line {number}: expected {{"question": str, "steps": [str], "answer": str}} ({error!r})'
            ) from error
        strings = isinstance(steps, list) and all(isinstance(x, str) for x in (question, answer, *steps))
        if not strings:
            raise DataError(f"{path}, line {number}: question and answer must be strings, steps a list of strings")
        yield Example(question, tuple(steps), answer, record)
