"""Supervision from ProsQA's graphs: the token of a node, and chains from other start nodes."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from slr_core.errors import DataError
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import distances, graph_of

Chain = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
"""Start symbols and their breadth-first frontiers."""


class NodeTokens:
    """The token of each node of a graph.

    Args:
        tokenizer: must have one token per mention of a node, like :func:`slr_core.training.tokenizer.prosqa_tokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, int] = {}

    def __call__(self, symbol: str) -> int:
        """The token of ``symbol``: its object form, or a person's name.

        Raises:
            DataError: the tokenizer needs more than one token for it.
        """
        if symbol not in self._cache:
            ids = self.tokenizer(symbol if symbol[0].isupper() else f"Every {symbol} is a {symbol}.").input_ids
            if len(ids) != (1 if symbol[0].isupper() else 2):
                raise DataError(
                    f"objectives.frontier needs a tokenizer with one token per mention of a node; {symbol!r} has more"
                )
            self._cache[symbol] = ids[-1]
        return self._cache[symbol]

    def all(self, symbols: tuple[str, ...] | list[str]) -> list[int]:
        """The tokens of several symbols."""
        return [self(symbol) for symbol in symbols]


def draw_chains(example: Example, count: int, length: int, rng: random.Random) -> tuple[Chain, ...]:
    """Draw ``count`` start sets of one or two nodes, each with at most ``length`` breadth-first frontiers."""
    if length == 0:
        return ()
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    parents = sorted({parent for parent, _ in graph.edges})
    chains = []
    for _ in range(count):
        start = rng.sample(parents, min(len(parents), 1 if rng.random() < 0.7 else 2))
        nearest: dict[int, int] = {}
        for node in start:
            for other, distance in distances(graph.edges, node).items():
                nearest[other] = min(distance, nearest.get(other, distance))
        levels: list[list[str]] = [[] for _ in range(length)]
        for node, distance in nearest.items():
            if 1 <= distance <= length:
                levels[distance - 1].append(symbols[node])
        chains.append((tuple(symbols[n] for n in start), tuple(tuple(level) for level in levels if level)))
    return tuple(chains)
