"""Generated word problems of 2 to 6 steps, with held-out wordings and numbers to test on.

Every step works on the result of the step before, so that all of them are needed. A question is a story about one
person's things, then perhaps another person's, and asks for a number at its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from slr_core.errors import ConfigError
from slr_core.tasks.base import Card, Example, OptionValue
from slr_core.tasks.word_problem_forms import NAMES, OTHER_THINGS, PARTS, SENTENCES, STEP_WORDS, THINGS, Forms
from slr_core.tasks.word_problems import GRADING, WordProblem

_SIGNS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}
_COST = {"add_packs": 2, "subtract_packs": 2}
_MIDDLE = ("add", "subtract", "add_packs", "subtract_packs", "double", "more", "fewer", "times", "part")
_ENDS = ("ask", "ask_together", "ask_difference", "ask_price", "ask_boxes")
_MOST_STEPS, _FACTOR = 6, 9


class GeneratedWordProblems(WordProblem):
    """The task: word problems of a chosen number of steps; difficulty is the number of steps."""

    name = "word_problems"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {
        "min_steps": 2,
        "max_steps": 6,
        "least": 2,
        "most": 20,
        "distractors": 1,
        "steps": "equations",
        "templates": "train",
    }
    card = Card(
        origin="generated here: stories of additions, subtractions, multiplications and exact divisions, in which "
        "every step works on the result of the one before. `templates: held_out` has other names, things and "
        "sentences; numbers that are added or subtracted lie between `least` and `most`, factors are 2 to 9,"
        " results 2 to ten times `most`; up to `distractors` sentences have a number that is not needed",
        licence="Apache-2.0, as this project",
        splits={},
        grading=GRADING,
        shortcuts={
            "sum": "the sum of all numbers of the question: 0.028 of 4,000 questions of two steps, 0.011 of all lengths"
        },
    )

    def baselines(self, example: Example) -> dict[str, float]:
        """Whether the answer is the sum of all numbers of the question."""
        numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in example.question).split()]
        return {"sum": float(str(sum(numbers)) == example.answer)}

    def difficulty(self, example: Example) -> int:
        """The number of steps of the story."""
        return len(example.extra["eq_steps"])

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        low, high, least, most = (options[name] for name in ("min_steps", "max_steps", "least", "most"))
        if not 2 <= low <= high <= _MOST_STEPS:
            raise ConfigError(
                f"word_problems: min_steps and max_steps must be 2 to {_MOST_STEPS} in order, got {low}, {high}"
            )
        if not 2 <= least < most <= 1000 or most < 5:
            raise ConfigError(
                f"word_problems: least and most must be 2 to 1000, most above least and 4, got {least}, {most}"
            )
        if options["distractors"] < 0:
            raise ConfigError(f"word_problems: distractors must be at least 0, got {options['distractors']}")
        for name, values in (("steps", ("equations", "words", "running")), ("templates", ("train", "held_out"))):
            if options[name] not in values:
                named = f"{', '.join(values[:-1])} or {values[-1]}"
                raise ConfigError(f"word_problems: {name} must be {named}, got {options[name]}")
        return _stream(options, random.Random(seed))


def _stream(options: Mapping[str, Any], rng: random.Random) -> Iterator[Example]:
    while True:
        length = rng.randint(options["min_steps"], options["max_steps"])
        made = None
        while made is None:  # a story that has nowhere to go on is dropped
            made = _Story(options, rng).tell(length)
        yield made


class _Story:
    """A question in the making: people, what they have, sentences and steps so far."""

    def __init__(self, options: Mapping[str, Any], rng: random.Random) -> None:
        self.options, self.rng = options, rng
        self.limit = 10 * options["most"]
        self.names = rng.sample(self._forms(NAMES), _MOST_STEPS + 2)
        self.thing = rng.choice(self._forms(THINGS))
        self.has: dict[str, int] = {}
        self.sentences: list[str] = []
        self.equations: list[str] = []
        self.words: list[str] = []
        self.running: list[str] = []
        self.result = ""  # what a running calculation goes on from
        self.person = self.names[0]
        self.apart: set[str] = set()  # people whose difference from this person does not depend on the start

    @property
    def value(self) -> int:
        """What the person has of whom the story tells."""
        return self.has[self.person]

    def tell(self, length: int) -> Example | None:
        """A question of ``length`` steps; ``None`` if the numbers leave no way to reach that length."""
        rng = self.rng
        self.has[self.person] = start = rng.randint(self.options["least"], self.options["most"])
        self._say("start", n=start)
        end = rng.choice(_ENDS)
        left = length - (end != "ask")
        while left:
            fitting = [kind for kind in _MIDDLE if _COST.get(kind, 1) <= left and self._numbers(kind)]
            if not fitting:
                return None
            kind = rng.choice(fitting)
            self._go_on(kind, *rng.choice(self._numbers(kind)))
            left -= _COST.get(kind, 1)
        answer = self._ask(end)
        if answer is None:
            return None
        for _ in range(rng.randint(0, self.options["distractors"])):
            self._distract()
        self.running[-1] = self.running[-1].partition("=")[0]  # the answer follows
        steps = {"equations": self.equations, "words": self.words, "running": self.running}[self.options["steps"]]
        return Example(" ".join(self.sentences), tuple(steps), str(answer), {"eq_steps": list(self.equations)})

    def _numbers(self, kind: str) -> list[tuple[int, int]]:
        """The pairs ``(n, m)`` with which a step of this kind keeps every amount within 2 ... limit."""
        value, limit = self.value, self.limit
        plain = range(self.options["least"], self.options["most"] + 1)
        factors = range(2, _FACTOR + 1)
        if kind in ("add", "more"):
            return [(n, 0) for n in plain if value + n <= limit]
        if kind in ("subtract", "fewer"):
            return [(n, 0) for n in plain if n <= value - 2]
        if kind in ("add_packs", "subtract_packs"):
            sign = 1 if kind == "add_packs" else -1
            return [(n, m) for n in factors for m in factors if 2 <= value + sign * n * m <= limit]
        if kind == "double":
            return [(2, 0)] if 2 * value <= limit else []
        if kind == "times":
            return [(n, 0) for n in factors if n * value <= limit]
        return [(n, 0) for n in PARTS if value % n == 0 and value > n]

    def _go_on(self, kind: str, n: int, m: int) -> None:
        if kind in ("more", "fewer", "times", "part"):
            other = next(name for name in self.names if name not in self.has)
            self._say(kind, b=other, n=PARTS[n] if kind == "part" else n)
            sign = {"more": "+", "fewer": "-", "times": "*", "part": "/"}[kind]
            value = self._compute(kind, self.value, sign, n, b=other)
            self.apart.add(self.person)
            self.person = other
        else:
            self._say(kind, n=n, m=m)
            if kind.endswith("_packs"):
                n = self._compute("packs", m, "*", n)
                kind = kind.removesuffix("_packs")
            value = self._compute(kind, self.value, {"add": "+", "subtract": "-", "double": "*"}[kind], n)
        self.has[self.person] = value
        if kind in ("times", "part", "double"):
            self.apart.clear()

    def _ask(self, end: str) -> int | None:
        rng, value = self.rng, self.value
        if end == "ask":
            self._say(end)
            return value
        if end in ("ask_together", "ask_difference"):
            left_out = {self.person} | (self.apart if end == "ask_difference" else set())
            most = self.limit - value if end == "ask_together" else self.limit
            others = [
                name for name, has in self.has.items() if name not in left_out and abs(has - value) > 1 and has <= most
            ]
            if not others:
                return None
            other = rng.choice(others)
            if end == "ask_together":
                self._say(end, b=other)
                return self._compute(end, value, "+", self.has[other])
            larger, smaller = (self.person, other) if value > self.has[other] else (other, self.person)
            self._say(end, a=larger, b=smaller)
            return self._compute(end, self.has[larger], "-", self.has[smaller])
        divides = end == "ask_boxes"
        fitting = [
            n for n in range(2, _FACTOR + 1) if (value % n == 0 and value > n if divides else value * n <= self.limit)
        ]
        if not fitting:
            return None
        n = rng.choice(fitting)
        self._say(end, n=n)
        return self._compute(end, value, "/" if divides else "*", n)

    def _distract(self) -> None:
        """Put a sentence with a number that is not needed somewhere between the first sentence and the question."""
        sentence = self._sentence(
            "distractor",
            b=self.names[-1],
            n=self.rng.randint(self.options["least"], self.options["most"]),
            x=self.rng.choice(self._forms(OTHER_THINGS)),
        )
        self.sentences.insert(self.rng.randint(1, len(self.sentences) - 1), sentence)

    def _compute(self, kind: str, left: int, sign: str, right: int, **fields: str) -> int:
        result = _SIGNS[sign](left, right)
        self.equations.append(f"<<{left}{sign}{right}={result}>>")
        self.running.append(f"{self._continued(str(left), sign, str(right))}={result}")
        self.result = str(result)
        known = {"a": self.person, "x": self.thing} | fields
        self.words.append(STEP_WORDS[kind].format(l=left, r=right, v=result, **known))
        return result

    def _continued(self, left: str, sign: str, right: str) -> str:
        """The calculation, going on from the result of the step before where it can."""
        if left == self.result:
            return f"{sign}{right}"
        return f"{sign}{left}" if right == self.result and sign in "+*" else f"{left}{sign}{right}"

    def _say(self, kind: str, **fields: object) -> None:
        self.sentences.append(self._sentence(kind, **fields))

    def _sentence(self, kind: str, **fields: object) -> str:
        known: dict[str, object] = {"a": self.person, "x": self.thing}
        return self.rng.choice(self._forms(SENTENCES[kind])).format(**known | fields)

    def _forms(self, forms: Forms) -> tuple[str, ...]:
        return forms.train if self.options["templates"] == "train" else forms.held_out
