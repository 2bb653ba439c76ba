"""Modular arithmetic: a number is added to and multiplied again and again; what is it in the end, modulo m.

Additions and multiplications by units are permutations of the residues that do not commute, as in state tracking: no
operation can be left out, and their order matters.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.arithmetic import Arithmetic
from slr_core.tasks.base import Card, Example, OptionValue
from slr_core.tasks.reading import Number, reference_number, stated_number

_MOST_MODULUS = 1000
_MODULUS = re.compile(r"What is the result modulo (\d+)\?")
_NAMED_MODULUS = re.compile(r"[(\[]?\s*(?:\\?[pb]?mod(?:ul[oe]|ulus)?\b|%)[\s{]*\d+\s*}?\s*[)\]]?", re.I)
_START = re.compile(r"Start with (\d+)\.")
_OPERATION = re.compile(r"(?:Add|Multiply by) (\d+)\.")


class ModularArithmetic(Arithmetic):
    """The task: the residue in the end, from 0 to m - 1; the number of operations as difficulty."""

    name = "modular_arithmetic"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"modulus": 7, "length": 4}
    card = Card(
        origin="generated here: a uniform residue; each operation adds 1 to m - 1 or multiplies by 2 to m - 1, where "
        "only factors without a common divisor with m are drawn, so that all residues are equally likely in the end",
        licence="Apache-2.0, as this project",
        splits={},
        grading="the number stated as the answer, else the last one; exact, commas do not count. A modulus named after "
        "it, as in `3 (mod 7)`, is not the answer",
        shortcuts={
            "start": "answers the number of the start: with modulus 7, 0.07 after one operation, 0.19 after two, 0.14 "
            "to 0.15 after more",
            "last": "answers the number of the last operation: with modulus 7, 0.14 to 0.15",
        },
    )

    def check_example(self, example: Example) -> None:
        """It must have a start, operations and a modulus, and the answer must be a residue.

        Raises:
            DataError: one of them is not so.
        """
        _numbers(example)
        answer, modulus = reference_number(example), _modulus(example)
        if answer not in range(modulus):
            raise DataError(f"the reference answer {example.answer[:80]!r} is not a residue, 0 to {modulus - 1}")

    def baselines(self, example: Example) -> dict[str, float]:
        """Rules that compute nothing."""
        numbers, answer = _numbers(example), reference_number(example)
        return {"start": float(numbers[0] == answer), "last": float(numbers[-1] == answer)}

    def stated(self, text: str) -> Number | None:
        """The number that a text gives as its answer, and not the modulus that it names."""
        return stated_number(_NAMED_MODULUS.sub(" ", text))

    def difficulty(self, example: Example) -> int:
        """Operations of the question."""
        return len(_numbers(example)) - 1

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        modulus, length = options["modulus"], options["length"]
        if not 3 <= modulus <= _MOST_MODULUS:
            raise ConfigError(f"modular_arithmetic: modulus must be 3 to {_MOST_MODULUS}, got {modulus}")
        if length < 1:
            raise ConfigError(f"modular_arithmetic: length must be at least 1, got {length}")
        return _stream(modulus, length, random.Random(seed))


def _numbers(example: Example) -> list[int]:
    """The number of the start, then that of each operation."""
    start, operations = _START.search(example.question), _OPERATION.findall(example.question)
    if start is None or not operations:
        raise _other_question(example)
    return [int(start.group(1)), *map(int, operations)]


def _modulus(example: Example) -> int:
    found = _MODULUS.search(example.question)
    if found is None:
        raise _other_question(example)
    return int(found.group(1))


def _other_question(example: Example) -> DataError:
    return DataError(
        f"not a modular-arithmetic question: {example.question[:80]!r}; other questions are for the task text"
    )


def _stream(modulus: int, length: int, rng: random.Random) -> Iterator[Example]:
    factors = [k for k in range(2, modulus) if gcd(k, modulus) == 1]
    while True:
        value = rng.randrange(modulus)
        parts, steps = [f"Start with {value}."], []
        for _ in range(length):
            if rng.random() < 0.5:
                number = rng.randrange(1, modulus)
                words, sign, result = f"Add {number}.", "+", (value + number) % modulus
            else:
                number = rng.choice(factors)
                words, sign, result = f"Multiply by {number}.", "*", value * number % modulus
            parts.append(words)
            steps.append(f"{value} {sign} {number} = {result}")
            value = result
        yield Example(f"{' '.join(parts)} What is the result modulo {modulus}?", tuple(steps), str(value))
