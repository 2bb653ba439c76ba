"""State tracking: a row of elements is rearranged again and again; what is the order in the end.

The word problem of the symmetric groups. For five elements it is complete for NC1, which constant-depth
transformers are believed not to reach without steps: the length decides how much computation a question needs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, OptionValue, Task
from slr_core.tasks.reading import statement

_LETTERS = "abcde"
_ROW = re.compile(r"(?<![A-Za-z])[a-e](?:(?:[ \t]*,[ \t]*|[ \t]+)[a-e](?![A-Za-z]))+", re.I)
_START = re.compile(r"Start with ((?:[a-e] ?)+)\.")


class StateTracking(Task):
    """The task: the row in the end; the number of rearrangements as difficulty."""

    name = "state_tracking"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"elements": 5, "length": 8}
    card = Card(
        origin="generated here: uniform permutations of 3 to 5 elements, one after the other",
        licence="Apache-2.0, as this project",
        splits={},
        grading="the last row of letters in the stated answer, else in the text, must be the right one; commas and "
        "case do not count",
        shortcuts={"identity": "answers the row of the start: 1 / elements! (0.167, 0.042, 0.008)"},
    )

    def check_example(self, example: Example) -> None:
        """It must name the row of the start.

        Raises:
            DataError: it does not.
        """
        _start(example)

    def extract(self, text: str) -> str | None:
        """The last row of letters, with single spaces."""
        where = statement(text, _ROW.search)
        for words in (where.words, where.rest):
            if rows := _ROW.findall(words):
                return " ".join(re.findall(r"[a-e]", rows[-1].lower()))
        return None

    def grade(self, example: Example, text: str) -> bool:
        """The whole row must be right."""
        return self.extract(text) == example.answer

    def baselines(self, example: Example) -> dict[str, float]:
        """Whether the row in the end is that of the start."""
        return {"identity": float(_start(example) == example.answer)}

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        elements, length = options["elements"], options["length"]
        if not 3 <= elements <= len(_LETTERS):
            raise ConfigError(f"state_tracking: elements must be 3 to {len(_LETTERS)}, got {elements}")
        if length < 1:
            raise ConfigError(f"state_tracking: length must be at least 1, got {length}")
        return _stream(elements, length, random.Random(seed))


def _start(example: Example) -> str:
    found = _START.search(example.question)
    if found is None:
        raise DataError(
            f"not a state-tracking question: {example.question[:80]!r}; other questions are for the task text"
        )
    return found.group(1)


def _stream(elements: int, length: int, rng: random.Random) -> Iterator[Example]:
    while True:
        row = list(_LETTERS[:elements])
        parts, steps = [f"Start with {' '.join(row)}."], []
        for _ in range(length):
            places = rng.sample(range(elements), elements)
            row = [row[place] for place in places]
            parts.append(f"Take {' '.join(str(place + 1) for place in places)}.")
            steps.append(" ".join(row))
        yield Example(f"{' '.join(parts)} What is the order now?", tuple(steps), steps[-1])
