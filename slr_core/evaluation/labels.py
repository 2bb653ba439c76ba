"""What a latent state may hold: labels of questions and iterations, which probes are trained to read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import frontiers, graph_of

Value = str | frozenset[str]


@dataclass(frozen=True)
class Label:
    """Something that a state may hold.

    Attributes:
        name: of the label.
        help: what it is, in a line.
        of: its value for a question at an iteration: a class, or the set of classes that apply; ``None`` or the
            empty set where there is none, and the question is then left out.
    """

    name: str
    help: str
    of: Callable[[Example, int], Value | None]


def _frontier(example: Example, t: int) -> Value | None:
    levels = frontiers(example)
    # At 0 it is the person asked about, and no concept.
    return frozenset(levels[t]) if 0 < t < len(levels) else None


def _remaining(example: Example, t: int) -> Value | None:
    return str(max(0, len(frontiers(example)) - 1 - t))


def _option(example: Example, _: int) -> Value | None:
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    asked = re.findall(r"\w+", example.question)[-3:]
    target, other = symbols[graph.target], symbols[graph.neg_target]
    if target not in asked or other not in asked:
        return None
    return "first" if asked.index(target) < asked.index(other) else "second"


def _target_of(example: Example, _: int) -> Value | None:
    return frozenset((example.extra["idx_to_symbol"][graph_of(example).target],))


def _step(example: Example, t: int) -> str | None:
    return example.steps[t - 1] if 0 < t <= len(example.steps) else None


def _sum(example: Example, t: int) -> str | None:
    """What the column of step t adds up to; in a multiplication, nothing."""
    found = re.fullmatch(r"\d \+ \d \+ \d = (\d+)", _step(example, t) or "")
    return found.group(1) if found else None


def _digit(example: Example, t: int) -> Value | None:
    total = _sum(example, t)
    return None if total is None else total[-1]


def _carry(example: Example, t: int) -> Value | None:
    total = _sum(example, t)
    return None if total is None else str(int(len(total) > 1))


def _row(example: Example, t: int) -> Value | None:
    places = enumerate((_step(example, t) or "").split(), start=1)
    return frozenset(f"{place}: {element}" for place, element in places)


def _reached(example: Example, t: int) -> Value | None:
    return frozenset(re.findall(r"\d+", (_step(example, t) or "").partition(":")[2]))


def _answer(example: Example, _: int) -> Value | None:
    return example.answer


_TRUTH = Label("answer", "whether the statement is true", _answer)
LABELS: dict[str, tuple[Label, ...]] = {
    "prosqa": (
        Label("frontier", "the concepts at distance t from the person asked about", _frontier),
        Label("distance", "hops that are left to the right option after t", _remaining),
        Label("option", "which of the two options is right, the first or the second named", _option),
        Label("target", "the right option itself, of all concepts", _target_of),
    ),
    "prontoqa": (_TRUTH,),
    "reachability": (Label("frontier", "the nodes first reached after t links", _reached), _TRUTH),
    "arithmetic": (
        Label("digit", "the digit that column t of the addition leaves", _digit),
        Label("carry", "whether column t carries", _carry),
    ),
    "state_tracking": (Label("row", "which element lies where after t rearrangements", _row),),
}
"""What can be looked for, by the name of the task; a new task puts its labels here."""
