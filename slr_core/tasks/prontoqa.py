"""ProntoQA: does a statement about someone follow from rules in words, several hops away.

The reader and grader for the official questions (5 hops), and a generator for other numbers of hops in
the same form. It adds a ``balanced`` form without the shortcut of the official one: see
:func:`mention_rule`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, OptionValue, Task
from slr_core.tasks.prosqa import CONCEPTS as _MORE_CONCEPTS
from slr_core.tasks.reading import check_truth, stated_truth, written_steps

NAMES = tuple("Alex Fae Max Polly Rex Sally Sam Stella Wren".split())
CONCEPTS = tuple(
    "brimpus dumpus gorpus grimpus impus jompus lempus lorpus numpus rompus shumpus sterpus tumpus vumpus "
    "wumpus yumpus zumpus".split()
)
PROPERTIES = tuple(
    tuple(family.split())
    for family in (
        "blue red brown orange",
        "small large",
        "wooden metallic luminous liquid",
        "transparent opaque",
        "nervous happy feisty shy",
        "bright dull",
        "sweet sour spicy bitter",
        "fruity earthy floral",
        "hot cold temperate",
        "mean angry amenable aggressive kind",
        "melodic muffled discordant loud",
        "slow moderate fast",
        "windy sunny overcast rainy snowy",
    )
)

# Shares of negated properties, and of questions with the answer True, in the 9,200 official training and
# validation questions.
_NEGATED_ON_PATH, _NEGATED_TARGET, _NEGATED_ELSEWHERE = 0.274, 0.467, 0.331
_TRUE = 0.49
MOST_HOPS = (len(_MORE_CONCEPTS) - 4) // 4
"""Two chains of two concepts a hop and a root each, and the two of the unrelated rules."""
_OFFICIAL_HOPS = (len(CONCEPTS) - 4) // 2  # hops for which the official concepts are enough


@dataclass(frozen=True)
class _Property:
    word: str
    negated: bool

    def opposite(self) -> _Property:
        return _Property(self.word, not self.negated)

    def said_of(self, name: str) -> str:
        return f"{name} is {'not ' * self.negated}{self.word}."


class _Words:
    """Concepts, each handed out once, and property families: the others again, but not the first, when none is left."""

    def __init__(self, concepts: tuple[str, ...], rng: random.Random) -> None:
        self._rng = rng
        self._concepts = rng.sample(concepts, len(concepts))
        self._families = rng.sample(PROPERTIES, len(PROPERTIES))
        self._first = self._families[-1]

    def concept(self) -> str:
        return self._concepts.pop()

    def property(self, negated: float) -> _Property:
        if not self._families:
            self.renew()
        return _Property(self._rng.choice(self._families.pop()), self._rng.random() < negated)

    def renew(self) -> None:
        """All families again, but the first."""
        families = [family for family in PROPERTIES if family != self._first]
        self._families = self._rng.sample(families, len(families))


def generate_prontoqa(hops: int, balanced: bool, seed: int) -> Iterator[Example]:
    """Endless stream of questions that need ``hops`` rules, the same for the same arguments."""
    if not 1 <= hops <= MOST_HOPS:
        raise ConfigError(f"prontoqa: hops must be 1 to {MOST_HOPS} (there are no more concepts), got {hops}")
    return _stream(hops, balanced, random.Random(seed))


def _stream(hops: int, balanced: bool, rng: random.Random) -> Iterator[Example]:
    while True:
        yield _question(hops, balanced, rng)


def _question(hops: int, balanced: bool, rng: random.Random) -> Example:
    words = _Words(_MORE_CONCEPTS if balanced or hops > _OFFICIAL_HOPS else CONCEPTS, rng)
    rules: list[str] = []
    target = words.property(0.5 if balanced else _NEGATED_TARGET)
    chain, proof = _chain(hops, target, words, rules, rng)

    # A second, unrelated thing that the person is.
    unrelated = words.concept()
    rules.append(_is_a(unrelated, words.concept(), rng))
    rules.append(_is(unrelated, words.property(_NEGATED_ELSEWHERE), rng))

    # Someone else has the opposite property: a concept that is in no other sentence, or, balanced, one at
    # the same place of a chain of the same build, of which the person is nothing.
    if balanced:
        words.renew()
        _chain(hops, target.opposite(), words, rules, rng)
    else:
        rules.append(_is(words.concept(), target.opposite(), rng))

    rng.shuffle(rules)
    name = rng.choice(NAMES)
    premises = [_premise(name, chain[0]), _premise(name, unrelated)]
    rng.shuffle(premises)
    answer = rng.random() < (0.5 if balanced else _TRUE)
    asked = target if answer else target.opposite()
    steps = [f"{_premise(name, concept)} {rule}" for concept, rule in zip(chain, proof, strict=True)]
    return Example(
        question=f"{' '.join([*rules, *premises])} True or false: {asked.said_of(name)}",
        steps=(*steps, target.said_of(name)),
        answer=str(answer),
        extra={"hops": hops, "chain": chain},
    )


def _chain(
    hops: int, target: _Property, words: _Words, rules: list[str], rng: random.Random
) -> tuple[list[str], list[str]]:
    # ``hops`` concepts, each a kind of the next, the last with the target property; above it a root
    # without one. Every concept also is a kind of one that leads nowhere. Returns the concepts and the
    # sentences of the proof; all sentences go to ``rules``.
    chain = [words.concept() for _ in range(hops)]
    proof = []
    for concept, parent in zip(chain, [*chain[1:], None], strict=True):
        aside = words.concept()
        rules.append(_is_a(concept, aside, rng))
        rules.append(_is(aside, words.property(_NEGATED_ELSEWHERE), rng))
        upwards = _is_a(concept, parent or words.concept(), rng)
        holds = _is(concept, words.property(_NEGATED_ON_PATH) if parent else target, rng)
        rules += [upwards, holds]
        proof.append(upwards if parent else holds)
    return chain, proof


def _article(concept: str) -> str:
    return f"an {concept}" if concept[0] in "aeiou" else f"a {concept}"


def _premise(name: str, concept: str) -> str:
    return f"{name} is {_article(concept)}."


def _is_a(concept: str, parent: str, rng: random.Random) -> str:
    return _sentence(concept, _article(parent), f"{parent}es", rng)


def _is(concept: str, holds: _Property, rng: random.Random) -> str:
    said = "not " * holds.negated + holds.word
    return _sentence(concept, said, said, rng)


def _sentence(concept: str, singular: str, plural: str, rng: random.Random) -> str:
    form = rng.choice(("Each", "Every", None, None))
    return f"{form} {concept} is {singular}." if form else f"{concept.capitalize()}es are {plural}."


_RULE = re.compile(
    r"(?:(?:Each|Every) (?P<one>\w+) is|(?P<many>[A-Z]\w+)es are) (?P<negated>not )?(?:an? )?(?P<what>\w+)\."
)
_PREMISE = re.compile(r"\b(?!Each|Every)[A-Z]\w+ is an? (\w+)\.")
_QUESTION = re.compile(r"True or false: (?P<name>\w+) is (?P<negated>not )?(?P<what>\w+)\.\s*$")


def _asked(example: Example) -> re.Match[str]:
    asked = _QUESTION.search(example.question)
    if asked is None:
        raise DataError(f"not a ProntoQA question: {example.question[-80:]!r}; other questions are for the task text")
    return asked


def mention_rule(example: Example) -> float:
    """Expected score of the shortcut that makes no hop and never looks at the person asked about.

    Two rules speak of the property in question and contradict each other. This believes the one whose
    concept is mentioned in another sentence as well: in the official questions the other one never is.
    It scores 1.000 on the official training and validation files (9,200 questions), 0.5 on balanced
    ones.
    """
    asked = _asked(example)
    mentions: Counter[str] = Counter(_PREMISE.findall(example.question))
    about: list[tuple[str, bool]] = []
    for rule in _RULE.finditer(example.question):
        concept, what, negated = _rule(rule)
        mentions.update((concept, what))
        if what == asked["what"]:
            about.append((concept, negated))
    believed = {negated for concept, negated in about if mentions[concept] > 1}
    if len(believed) != 1:
        return 0.5
    return float(str(believed.pop() == bool(asked["negated"])) == example.answer)


_SAID = re.compile(r"(?P<name>[A-Z]\w+) is (?P<negated>not )?(?:an? )?(?P<what>\w+)\.")


def proves(example: Example, steps: Sequence[str]) -> bool:
    """Whether sentences prove the answer.

    Each is a rule of the question, or says of the person what a premise says or what follows from a rule written
    before and from what is known by then. The last says of the property asked about what the answer says.
    """
    asked = _asked(example)
    given = example.question[: asked.start()]
    rules = set(map(_rule, _RULE.finditer(given)))
    known = {(said["what"], bool(said["negated"])) for said in _SAID.finditer(given) if said["name"] == asked["name"]}
    follows: list[tuple[str, str, bool]] = []
    fact = None
    for step in steps:
        rule, said = _RULE.fullmatch(step), _SAID.fullmatch(step)
        fact = None
        if rule is not None and _rule(rule) in rules:
            follows.append(_rule(rule))
        elif said is not None and said["name"] == asked["name"]:
            fact = said["what"], bool(said["negated"])
            known.update(
                (what, no) for concept, what, no in follows if (what, no) == fact and (concept, False) in known
            )
            if fact not in known:
                return False
        else:
            return False
    return fact == (asked["what"], bool(asked["negated"]) == (example.answer == "True"))


def _rule(found: re.Match[str]) -> tuple[str, str, bool]:
    """Concept, what holds of it, and whether that is negated, whatever the form of the sentence."""
    return (found["one"] or found["many"]).lower(), found["what"].removesuffix("es"), bool(found["negated"])


class ProntoQA(Task):
    """The task: True or False; hops as difficulty."""

    name = "prontoqa"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"hops": 5, "balanced": False}
    card = Card(
        origin="Saparov and He 2022 (arXiv 2210.01240), asaparov/prontoqa run with the flags of coconut's README",
        licence="Apache-2.0 (generator), splits as coconut's (MIT)",
        splits={"train": "9,000, official", "valid": "200, official", "test": "800, official"},
        grading="the word True or False in the stated answer ('### True'), else the last one in the text; a negated "
        "word ('not true') or one inside another ('untrue') is no answer",
        known_faults=(
            "the concept that carries the opposite property occurs in no other sentence: see mention_rule",
            "published scores are at the ceiling (98.8 to 100.0), with and without thoughts",
        ),
        shortcuts={
            "always_true": "0.492 on the official training file",
            "mention_rule": "makes no hop: 1.000 on the official training and validation files, 0.500 on generated "
            "questions with balanced=true",
        },
    )

    def check_example(self, example: Example) -> None:
        """It must ask whether something is true or false.

        Raises:
            DataError: it does not.
        """
        _asked(example)
        check_truth(example)

    def extract(self, text: str) -> str | None:
        """``True`` or ``False``, see :func:`~slr_core.tasks.reading.stated_truth`."""
        return stated_truth(text)

    def grade(self, example: Example, text: str) -> bool:
        """The word must be the right one."""
        return stated_truth(text) == example.answer

    def grade_steps(self, example: Example, text: str) -> bool | None:
        """See :func:`proves`."""
        steps = written_steps(text)
        return proves(example, steps) if steps else None

    def baselines(self, example: Example) -> dict[str, float]:
        """The answer prior, and :func:`mention_rule`."""
        return {"always_true": float(example.answer == "True"), "mention_rule": mention_rule(example)}

    def difficulty(self, example: Example) -> int:
        """Rules to apply: one less than the steps, the last of which states the conclusion."""
        return len(example.steps) - 1

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        return generate_prontoqa(options["hops"], options["balanced"], seed)
