"""p-hop induction: go back to the last token's previous occurrence, take the token after it, and so on p times.

Sanford et al., 2024 (arXiv 2402.09268): a transformer needs about log p layers for p hops, and Saunshi et al., 2025
(arXiv 2502.17416) find that k layers looped L times come near k * L layers on it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, OptionValue, Task

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"(?<![A-Za-z])[a-z](?![A-Za-z])", re.I)


class PHop(Task):
    """The task: the token at the end of the hops; the number of hops as difficulty."""

    name = "p_hop"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"letters": 8, "length": 40, "min_hops": 1, "max_hops": 4}
    card = Card(
        origin="generated here: uniform letters, drawn again until every hop has somewhere to go",
        licence="Apache-2.0, as this project",
        splits={},
        grading="the last single letter of the text must be the right one; case does not count",
        shortcuts={
            "last": "answers the last letter: for 1, 2, 3 and 4 hops 0.12, 0.36, 0.23 and 0.30 with 8 letters; 0.25, "
            "0.63, 0.38 and 0.58 with 4, as the second hop often leads back",
            "most_frequent": "answers the letter that occurs most often, the first of several: 0.21 with 8 letters, "
            "0.37 with 4",
        },
    )

    def check_example(self, example: Example) -> None:
        """It must hold a row of letters and a number of hops.

        Raises:
            DataError: it does not.
        """
        _row(example)

    def extract(self, text: str) -> str | None:
        """The last single letter."""
        found = _WORD.findall(text)
        return found[-1].lower() if found else None

    def grade(self, example: Example, text: str) -> bool:
        """The letter must be the right one."""
        return self.extract(text) == example.answer

    def baselines(self, example: Example) -> dict[str, float]:
        """Rules that do not hop."""
        row = _row(example)
        frequent = Counter(row).most_common(1)[0][0]
        return {"last": float(row[-1] == example.answer), "most_frequent": float(frequent == example.answer)}

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        letters, length, least, most = (options[key] for key in ("letters", "length", "min_hops", "max_hops"))
        if not 2 <= letters <= len(_LETTERS):
            raise ConfigError(f"p_hop: letters must be 2 to {len(_LETTERS)}, got {letters}")
        if not 1 <= least <= most:
            raise ConfigError(f"p_hop: min_hops must be 1 to max_hops, got {least} and {most}")
        if length < letters * (most + 1):
            raise ConfigError(
                f"p_hop: length must be at least letters * (max_hops + 1), {letters * (most + 1)}, got {length}: "
                "shorter rows seldom have room for all hops"
            )
        return _stream(letters, length, least, most, random.Random(seed))


def follow(row: str, hops: int) -> list[str] | None:
    """The letter after each hop; ``None`` if a letter has no earlier occurrence."""
    place, passed = len(row) - 1, []
    for _ in range(hops):
        place = row.rfind(row[place], 0, place) + 1
        if place == 0:
            return None
        passed.append(row[place])
    return passed


def _row(example: Example) -> str:
    row, _, hops = example.question.partition(" ? ")
    letters = row.split(" ")
    if not hops.isdecimal() or not all(len(letter) == 1 and letter in _LETTERS for letter in letters):
        raise DataError(f"not a p-hop question: {example.question[:80]!r}; other questions are for the task text")
    return "".join(letters)


def _stream(letters: int, length: int, least: int, most: int, rng: random.Random) -> Iterator[Example]:
    while True:
        hops, passed = rng.randint(least, most), None
        while passed is None:
            row = "".join(rng.choices(_LETTERS[:letters], k=length))
            passed = follow(row, hops)
        yield Example(f"{' '.join(row)} ? {hops}", tuple(passed), passed[-1])
