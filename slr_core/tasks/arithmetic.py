"""Multi-digit arithmetic: addition and multiplication, of a chosen number of digits."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, OptionValue, Task
from slr_core.tasks.reading import Number, reference_number, stated_number

_OPERATIONS = {"add": "+", "multiply": "*"}
_MOST_DIGITS = 100
_PROBLEM = re.compile(r"(\d+) ([+*]) (\d+)")


class Arithmetic(Task):
    """The task: the exact result; the number of digits as difficulty."""

    name = "arithmetic"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"digits": 4, "operation": "add"}
    card = Card(
        origin="generated here: both operands have exactly the number of digits that is asked for",
        licence="Apache-2.0, as this project",
        splits={},
        grading="the number stated as the answer, else the last one; exact, commas do not count",
        shortcuts={
            "no_carry": "every column for itself, carries dropped: about 0.55 to the power of the digits when adding"
        },
    )

    def check_example(self, example: Example) -> None:
        """It must ask for a sum or product, and the answer must be a number.

        Raises:
            DataError: one of them is not so.
        """
        _problem(example)
        reference_number(example)

    def extract(self, text: str) -> str | None:
        """The stated number, see :func:`~slr_core.tasks.reading.stated_number`."""
        found = self.stated(text)
        return found.text if found else None

    def vote(self, text: str) -> Hashable | None:
        """The value of the stated number."""
        found = self.stated(text)
        return found.values if found else None

    def grade(self, example: Example, text: str) -> bool:
        """Exact."""
        gold, found = reference_number(example), self.stated(text)
        return found is not None and found.values[:1] == (gold,)

    def stated(self, text: str) -> Number | None:
        """The number that a text gives as its answer."""
        return stated_number(text)

    def baselines(self, example: Example) -> dict[str, float]:
        """Whether the result needs no carry."""
        found = _problem(example)
        a, b = ([int(digit) for digit in found.group(i)[::-1]] for i in (1, 3))
        return {"no_carry": float(all(column < 10 for column in _columns(a, b, found.group(2))))}

    def difficulty(self, example: Example) -> int:
        """Digits of the longer operand."""
        return max(len(word) for word in re.findall(r"\d+", example.question))

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        digits, operation = options["digits"], options["operation"]
        if not 1 <= digits <= _MOST_DIGITS:
            raise ConfigError(f"arithmetic: digits must be 1 to {_MOST_DIGITS}, got {digits}")
        if operation not in _OPERATIONS:
            raise ConfigError(f"arithmetic: operation must be {' or '.join(_OPERATIONS)}, got {operation}")
        return _stream(digits, _OPERATIONS[operation], random.Random(seed))


def _problem(example: Example) -> re.Match[str]:
    found = _PROBLEM.search(example.question)
    if found is None:
        raise DataError(f"not an arithmetic question: {example.question[:80]!r}; other questions are for the task text")
    return found


def _stream(digits: int, sign: str, rng: random.Random) -> Iterator[Example]:
    low = 10 ** (digits - 1)
    while True:
        a, b = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)
        steps, result = (_added(a, b), a + b) if sign == "+" else (_multiplied(a, b), a * b)
        yield Example(f"What is {a} {sign} {b}?", steps, str(result))


def _added(a: int, b: int) -> tuple[str, ...]:
    steps, carry = [], 0
    for x, y in zip(str(a)[::-1], str(b)[::-1], strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y} + {carry} = {total}")
        carry = total // 10
    return tuple(steps)


def _multiplied(a: int, b: int) -> tuple[str, ...]:
    parts = [int(digit) * 10**place for place, digit in enumerate(str(b)[::-1])]
    return tuple(f"{a} * {part} = {a * part}" for part in parts)


def _columns(a: list[int], b: list[int], sign: str) -> list[int]:
    # Lowest place first, before any carrying.
    columns = [0] * (len(a) + len(b))
    if sign == "+":
        for digits in (a, b):
            for place, digit in enumerate(digits):
                columns[place] += digit
    else:
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                columns[i + j] += x * y
    return columns
