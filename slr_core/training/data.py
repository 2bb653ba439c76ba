"""Examples made on the fly, off the critical path: generated, put into words and tokenized by a loader process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from slr_core.errors import DataError
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import distances, frontiers, generate_graph, graph_of, to_example
from slr_core.training.config import TrainConfig

IGNORE = -100
"""Padding of target sets and answers."""


@dataclass(frozen=True)
class LoopPlan:
    """How a batch loops.

    Attributes:
        iterations: of every row.
        backprop: gradients flow through the last so many; ``None``: all.
        chains_after: iterations that count as done before the chains' first.
    """

    iterations: int
    backprop: int | None = None
    chains_after: int = 0


@dataclass(frozen=True)
class Item:
    """An example and how its batch loops."""

    example: Example
    plan: LoopPlan
    chains: tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...]
    """Start symbols and their frontiers, per chain."""
    late: float = 0.0
    """Where its answer is written, from 0 (as soon as the work is done) to below 1 (after the last iteration)."""


class StageStream(IterableDataset[Item]):
    """The stages in order, ``batch_size`` items a step.

    Step ``s`` draws from its own generator, so that the data of a step depends on neither the number of
    loader processes nor on where a resumed run starts. Loader process ``k`` of ``n`` makes the batches of
    steps k, k + n, ...: the order in which ``DataLoader`` asks for them.

    Args:
        config: the recipe.
        first_step: where a resumed run goes on; what came before is not made again.
    """

    def __init__(self, config: TrainConfig, first_step: int = 0) -> None:
        self.config, self.first_step = config, first_step

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        step = -1
        for stage in self.config.stages:
            specs = [mix.spec() for mix in stage.graphs]
            for _ in range(stage.steps):
                step += 1
                if step < self.first_step or (step - self.first_step) % stride != offset:
                    continue
                rng, exits = (random.Random(f"{self.config.seed}/{step}{use}") for use in ("", "/exits"))
                spec = rng.choice(specs)  # graphs of one size to a batch: little of it is padding
                chains_after = rng.randint(0, self.config.chain_spread)
                plan = LoopPlan(self.config.iterations(stage, rng), stage.backprop, chains_after)
                chain_length = min(self.config.chain_length, stage.longest)
                for _ in range(self.config.optimizer.batch_size):
                    example = to_example(generate_graph(spec, rng), rng)
                    chains = draw_chains(example, self.config.chains, chain_length, rng)
                    yield Item(example, plan, chains, exits.random())


def draw_chains(
    example: Example, count: int, length: int, rng: random.Random
) -> tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...]:
    """Start sets of one or two nodes, each with its breadth-first frontiers, at most ``length`` of them."""
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


class Collator:
    """Items to tensors.

    The batch holds: ``input_ids``, ``attention_mask`` ``[B, L]`` (right-padded prompts); ``answer_ids``
    ``[B, A]`` (end token included, padded with -100); ``hops`` ``[B]``; ``exits`` ``[B]``, the iterations after
    which each answer is written; ``plan`` (a :class:`LoopPlan`);
    ``targets`` ``[B, T, K]``, the token set that state t should read as, padded with -100; and for the
    chains ``chain_starts`` ``[B, Q, 2]`` and ``chain_targets`` ``[B, Q, S, K]``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prefix: str, suffix: str, *, chain_of_thought: bool = False
    ) -> None:
        self.tokenizer, self.prefix, self.suffix = tokenizer, prefix, suffix
        self.chain_of_thought = chain_of_thought
        self._node_tokens: dict[str, int] = {}

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """The batch of one step."""
        prompts = self.tokenizer(
            [self.prefix + item.example.question + self.suffix for item in items],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        texts = [self._written(item.example) for item in items]
        answers = [[*ids, self._eos()] for ids in self.tokenizer(texts).input_ids]
        plan = items[0].plan
        hops, targets, exits = [], [], []
        for item, answer in zip(items, answers, strict=True):
            by_step = frontiers(item.example)[1:]
            hops.append(len(by_step))
            spare = max(0, plan.iterations - hops[-1])
            exits.append(min(plan.iterations, hops[-1] + 1 + int(item.late * spare)))
            sets = [[self.node_token(symbol) for symbol in symbols] for symbols in by_step[: plan.iterations]]
            targets.append(sets + [[answer[0]]] * (plan.iterations - len(sets)))
        chains = [item.chains for item in items]
        levels = [[[self._tokens(level) for level in chain] for _, chain in row] for row in chains]
        return {
            "input_ids": prompts["input_ids"],
            "attention_mask": prompts["attention_mask"],
            "answer_ids": _pad(answers),
            "hops": torch.tensor(hops),
            "exits": torch.tensor(exits),
            "plan": plan,
            "targets": _pad(targets) if plan.iterations else None,
            "chain_starts": _pad([[self._pair(start) for start, _ in row] for row in chains]) if chains[0] else None,
            "chain_targets": _pad(levels) if chains[0] else None,
        }

    def _written(self, example: Example) -> str:
        # The mark is where the published evaluation looks for the answer.
        return " ".join([*example.steps, "#", example.answer]) if self.chain_of_thought else example.answer

    def node_token(self, symbol: str) -> int:
        """The token that a state shows when it has reached ``symbol``: its object form, or a person's name.

        Raises:
            DataError: the tokenizer needs more than one token for it.
        """
        if symbol not in self._node_tokens:
            ids = self.tokenizer(symbol if symbol[0].isupper() else f"Every {symbol} is a {symbol}.").input_ids
            if len(ids) != (1 if symbol[0].isupper() else 2):
                raise DataError(f"the frontier objective needs one token per mention of a node, not so for {symbol!r}")
            self._node_tokens[symbol] = ids[-1]
        return self._node_tokens[symbol]

    def _tokens(self, symbols: tuple[str, ...]) -> list[int]:
        return [self.node_token(symbol) for symbol in symbols]

    def _pair(self, start: tuple[str, ...]) -> list[int]:
        return [self.node_token(start[0]), self.node_token(start[-1])]

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def _pad(nested: list[Any]) -> Tensor:
    """A nested list of integers as a dense tensor, padded with -100."""
    shape: list[int] = []
    level: list[Any] = nested
    while level and isinstance(level[0], list):
        shape.append(max(map(len, level)))
        level = [x for inner in level for x in inner]
    full = torch.full([len(nested), *shape], IGNORE)
    _fill(full, nested)
    return full


def _fill(target: Tensor, nested: list[Any]) -> None:
    for row, values in zip(target, nested, strict=False):
        if values and isinstance(values[0], list):
            _fill(row, values)
        elif isinstance(values, list):
            row[: len(values)] = torch.tensor(values, dtype=torch.long)
        else:
            row.fill_(values)
