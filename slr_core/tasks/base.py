"""What every task shares: the example record, reading it from JSON lines, and the task interface."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.suggest import did_you_mean


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


OptionValue = int | float | bool | str


@dataclass(frozen=True)
class HubSplit:
    """Where one split of a public data set lies: data set id, subset (configuration) and split name."""

    dataset: str
    subset: str | None
    split: str


@dataclass(frozen=True)
class Card:
    """What a reader of a figure has to know about the data behind it.

    Attributes:
        origin: who made it, how.
        licence: of the data.
        splits: name of each split and what it is.
        grading: the rule by which an answer counts, and whose rule it is.
        known_faults: what is known to be wrong with the data or with its grading.
        shortcuts: each rule of ``baselines`` and what it is worth where that was measured.
    """

    origin: str
    licence: str
    splits: Mapping[str, str]
    grading: str
    known_faults: tuple[str, ...] = ()
    shortcuts: Mapping[str, str] = field(default_factory=dict)


class Task(ABC):
    """A source of questions and the rule that grades their answers.

    Attributes:
        name: the one by which :func:`slr_core.tasks.get_task` finds it.
        card: about the data.
        hub: the public data, by the name under which a split is asked for; empty where none is known.
        generator_options: the generator's settings and their defaults; empty where questions cannot be generated.
        needs: modules of the extra ``eval`` without which nothing can be graded.
    """

    name: str
    card: ClassVar[Card]
    hub: ClassVar[Mapping[str, HubSplit]] = {}
    generator_options: ClassVar[Mapping[str, OptionValue]] = {}
    needs: ClassVar[tuple[str, ...]] = ()

    def prompt(self, example: Example) -> str:
        """The text put to the model; the checkpoint's own prefix and suffix come around it.

        The published evaluations of latent reasoners (Coconut, CODI) put the bare question.
        """
        return example.question

    def recognizes(self, example: Example) -> bool:
        """Whether the fields of ``example`` tell that it belongs to this task and to no other."""
        return False

    def check_example(self, example: Example) -> None:  # noqa: B027  # most tasks can grade any answer
        """Check that ``example`` has what the task needs in order to grade it.

        Raises:
            DataError: it has not.
        """

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """The final answer as written in ``text``; None where it states none."""

    @abstractmethod
    def grade(self, example: Example, text: str) -> bool:
        """Whether ``text``, as the model wrote it, answers ``example``."""

    def vote(self, text: str) -> Hashable | None:
        """What ``text`` answers, for counting votes: equal for answers that the grader takes for the same."""
        return self.extract(text)

    def grade_steps(self, example: Example, text: str) -> bool | None:
        """Whether the steps written in ``text`` hold and lead to the right answer, whatever answer it then states.

        ``None`` where it writes none, or where the task has no rule for steps.
        """
        return None

    def baselines(self, example: Example) -> dict[str, float]:
        """Expected score (0 to 1) of each known shortcut rule on ``example``; empty where none is known."""
        return {}

    def difficulty(self, example: Example) -> int:
        """The number of reasoning steps that the question needs, or the level that the data states."""
        return len(example.steps)

    def from_row(self, row: Mapping[str, Any]) -> Example:
        """One row of the public data set as an example."""
        raise ConfigError(f"the task {self.name} has no public data set")

    def generate(self, seed: int, **options: OptionValue) -> Iterator[Example]:
        """Endless stream of examples, the same for the same seed and options.

        See :meth:`generator_settings` for the options.

        Raises:
            ConfigError: there is no generator, no such option, or its value is out of range.
        """
        return self._generate(seed, self.generator_settings(options))

    def generator_settings(self, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """All options of the generator; one that is given as a string is converted to the type of its default.

        Raises:
            ConfigError: there is no generator, no such option, or its value is of another type.
        """
        if not self.generator_options:
            raise ConfigError(f"the task {self.name} cannot generate questions: give a file or a split")
        unknown = sorted(options.keys() - self.generator_options.keys())
        if unknown:
            raise ConfigError(
                f"{self.name} has no generator option {unknown[0]}; it has {', '.join(self.generator_options)}"
                f"{did_you_mean(unknown[0], self.generator_options)}"
            )
        return dict(self.generator_options) | {
            k: _converted(self.name, k, v, self.generator_options[k]) for k, v in options.items()
        }

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        raise NotImplementedError


def _converted(task: str, name: str, value: OptionValue, default: OptionValue) -> OptionValue:
    kind = type(default)
    if isinstance(value, str):
        words: dict[str, OptionValue] = {"true": True, "false": False}
        try:
            return words[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ConfigError(f"{task}: {name} must be like {default!r}, got {value!r}")


def read_jsonl(path: str | Path) -> list[Example]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file, one ``{"question", "steps", "answer", ...}`` a line.

    ``steps`` may be left out, and all further fields are kept.

    Raises:
        DataError: the file is missing, is not JSON lines, or a line lacks a field or has a lone surrogate (the line is
            named).
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines: JSON strings may hold other line separators
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot read {path}: {reason}") from error
    return list(_parse(path, lines))


def _parse(path: Path, lines: Sequence[str]) -> Iterator[Example]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, steps, answer = record.pop("question"), record.pop("steps", []), record.pop("answer")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            fault = f"no field {error}" if isinstance(error, KeyError) else "not a JSON object"
            raise DataError(
                f'{path}, line {number}: {fault}; expected {{"question": str, "answer": str}}, and "steps": [str] if '
                "there are any"
            ) from error
        strings = isinstance(steps, list) and all(isinstance(x, str) for x in (question, answer, *steps))
        if not strings:
            raise DataError(f"{path}, line {number}: question and answer must be strings, steps a list of strings")
        if re.search("[\ud800-\udfff]", "".join((question, *steps, answer))):
            raise DataError(f"{path}, line {number}: expected Unicode text, got a lone surrogate such as \\ud800")
        yield Example(question, tuple(steps), answer, record)
