"""Graph reachability: can one node be reached from another, along directed links.

Every graph holds two chains of the same length, each with its own start and end, and further links that
never let one chain's start reach the other's end. The question pairs a start and an end by two coin
flips: whoever looks at the start alone, or at the end alone, is right half of the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar

from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Card, Example, OptionValue, Task
from slr_core.tasks.prosqa import distances
from slr_core.tasks.reading import check_truth, stated_truth

_BOTH = 3  # bit 1: may be reached from the first start, bit 2: from the second


class Reachability(Task):
    """The task: True or False; the length of the chains as difficulty."""

    name = "reachability"
    generator_options: ClassVar[Mapping[str, OptionValue]] = {"hops": 4, "nodes": 16, "degree": 1.5}
    card = Card(
        origin="generated here",
        licence="Apache-2.0, as this project",
        splits={},
        grading="as prontoqa",
        shortcuts={"always_true": "0.5 by construction"},
    )

    def recognizes(self, example: Example) -> bool:
        """Whether it has the fields of a graph with links."""
        return example.extra.keys() >= {"hops", "links", "source", "target"}

    def check_example(self, example: Example) -> None:
        """The answer must be True or False, and the length of the chains given.

        Raises:
            DataError: one of them is not so.
        """
        check_truth(example)
        if not isinstance(example.extra.get("hops"), int):
            raise DataError("a reachability question needs the field hops; other questions are for the task text")

    def extract(self, text: str) -> str | None:
        """``True`` or ``False``, see :func:`~slr_core.tasks.reading.stated_truth`."""
        return stated_truth(text)

    def grade(self, example: Example, text: str) -> bool:
        """The word must be the right one."""
        return stated_truth(text) == example.answer

    def baselines(self, example: Example) -> dict[str, float]:
        """The answer prior."""
        return {"always_true": float(example.answer == "True")}

    def difficulty(self, example: Example) -> int:
        """Links of the shortest way from a start to its end."""
        return int(example.extra["hops"])

    def _generate(self, seed: int, options: Mapping[str, Any]) -> Iterator[Example]:
        hops, nodes, degree = options["hops"], options["nodes"], options["degree"]
        if hops < 1 or nodes < 2 * (hops + 1):
            raise ConfigError(
                f"reachability: hops must be at least 1 and nodes at least 2 * (hops + 1): {hops}, {nodes}"
            )
        if not 1 <= degree <= nodes / 4:
            raise ConfigError(f"reachability: degree must be 1 to nodes / 4, got {degree} with {nodes} nodes")
        return _stream(hops, nodes, degree, random.Random(seed))


def _stream(hops: int, nodes: int, degree: float, rng: random.Random) -> Iterator[Example]:
    while True:
        yield _question(hops, nodes, degree, rng)


def _question(hops: int, nodes: int, degree: float, rng: random.Random) -> Example:
    names = rng.sample(range(nodes), nodes)
    chains = [names[: hops + 1], names[hops + 1 : 2 * hops + 2]]
    side = {n: bit for bit, chain in zip((1, 2), chains, strict=True) for n in chain}
    level = {n: i for chain in chains for i, n in enumerate(chain)}
    for n in names[2 * hops + 2 :]:
        side[n], level[n] = rng.randint(0, _BOTH), rng.randint(1, hops)

    links = {link for chain in chains for link in pairwise(chain)}
    allowed = [(a, b) for a in names for b in names if a != b and (a, b) not in links and _may_link(a, b, side, level)]
    wanted = max(0, round(nodes * degree) - len(links))
    links.update(rng.sample(allowed, min(wanted, len(allowed))))

    start, end = rng.randrange(2), rng.randrange(2)
    source, target = chains[start][0], chains[end][-1]
    shuffled = rng.sample(sorted(links), len(links))
    distance = distances(shuffled, source)
    furthest = distance.get(target, max(distance.values()))
    levels = [sorted(n for n, d in distance.items() if d == t) for t in range(1, furthest + 1)]
    return Example(
        question=f"Links: {' '.join(f'{a} to {b}.' for a, b in shuffled)} "
        f"True or false: {target} can be reached from {source}.",
        steps=tuple(f"After {t}: {', '.join(map(str, nodes))}." for t, nodes in enumerate(levels, start=1)),
        answer=str(start == end),
        extra={"hops": hops, "links": [list(link) for link in shuffled], "source": source, "target": target},
    )


def _may_link(a: int, b: int, side: Mapping[int, int], level: Mapping[int, int]) -> bool:
    # Whatever reaches a reaches b, so b must be open to all that a is open to. No link climbs more than one
    # level within a side, or the way to the end of its chain would get shorter.
    return side[a] | side[b] == side[b] and (side[a] != side[b] or level[b] <= level[a] + 1)
