"""Labels of questions and iterations, which probes are trained to predict from latent states."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import frontiers, graph_of

Value = str | frozenset[str]


@dataclass(frozen=True)
class Label:
    """A quantity that a state may contain.

    Attributes:
        name: of the label.
        help: its meaning, in one line.
        of: its value for a question at an iteration: a class, or the set of classes that apply. Questions for which it
            is ``None`` or the empty set are left out.
    """

    name: str
    help: str
    of: Callable[[Example, int], Value | None]


def _frontier(example: Example, t: int) -> Value | None:
    levels = frontiers(example)
    # At 0 it is the person in the question, not a concept.
    return frozenset(levels[t]) if 0 < t < len(levels) else None


def _remaining(example: Example, t: int) -> Value | None:
    return str(max(0, len(frontiers(example)) - 1 - t))


def _option(example: Example, _: int) -> Value | None:
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    options = re.findall(r"\w+", example.question)[-3:]
    target, other = symbols[graph.target], symbols[graph.neg_target]
    if target not in options or other not in options:
        return None
    return "first" if options.index(target) < options.index(other) else "second"


def _target_of(example: Example, _: int) -> Value | None:
    return frozenset((example.extra["idx_to_symbol"][graph_of(example).target],))


def _step(example: Example, t: int) -> str | None:
    return example.steps[t - 1] if 0 < t <= len(example.steps) else None


def _sum(example: Example, t: int) -> str | None:
    """The sum of the digits in the column of step t; ``None`` in a multiplication."""
    found = re.fullmatch(r"\d \+ \d \+ \d = (\d+)", _step(example, t) or "")
    return found.group(1) if found else None


def _digit(example: Example, t: int) -> Value | None:
    total = _sum(example, t)
    return None if total is None else total[-1]


def _carry(example: Example, t: int) -> Value | None:
    total = _sum(example, t)
    return None if total is None else str(int(len(total) > 1))


def _residue(example: Example, t: int) -> Value | None:
    found = re.search(r"= (\d+)$", _step(example, t) or "")
    return found.group(1) if found else None


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
        Label("frontier", "the concepts at distance t from the person in the question", _frontier),
        Label("distance", "number of hops from distance t to the right option", _remaining),
        Label("option", "whether the first or the second of the two options is right", _option),
        Label("target", "the right option, among all concepts", _target_of),
    ),
    "prontoqa": (_TRUTH,),
    "reachability": (Label("frontier", "the nodes reached after t links and not before", _reached), _TRUTH),
    "arithmetic": (
        Label("digit", "the result digit of column t of the addition", _digit),
        Label("carry", "whether column t has a carry", _carry),
    ),
    "modular_arithmetic": (Label("residue", "the number after t operations", _residue),),
    "state_tracking": (Label("row", "the element at each place after t rearrangements", _row),),
}
"""The labels of each task, by its name; add those of a new task here."""
