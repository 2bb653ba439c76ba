"""The batches of a run, off the critical path: drawn, put into words and tokenized by a loader process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from slr_core.config import TextConfig
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import frontiers
from slr_core.training.config import TrainConfig
from slr_core.training.graphs import Chain, NodeTokens, draw_chains
from slr_core.training.sources import CONTINUES, Source, source_of
from slr_core.training.stages import StageConfig

IGNORE = -100
"""Padding of target sets and labels."""
MARK = "#"
"""Between the steps in words and the answer: where the published evaluation looks for the answer."""


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
    """An example and how its batch loops.

    Attributes:
        example: the question.
        plan: of the whole batch.
        chains: other starts in its graph.
        exit: iterations after which its text is written.
        replaced: leading steps that its loop stands for.
        removed: leading tokens of the chain that are left out, in place of whole steps.
        short: a shorter loop for the objective `shortcut`, below the plan's iterations; 0 where there is none.
    """

    example: Example
    plan: LoopPlan
    chains: tuple[Chain, ...] = ()
    exit: int = 0
    replaced: int = 10**6
    removed: int | None = None
    short: int = 0


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process trains on.

    Attributes:
        process, processes: this one, of so many.
        passes: equal parts that each of them cuts its own into.
    """

    process: int = 0
    processes: int = 1
    passes: int = 1

    def of(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """The parts in order; rows are dealt out, so that neighbours of like length do not meet in one part."""
        own = items[self.process :: self.processes]
        return (list(own[i :: self.passes]) for i in range(self.passes))


class StageStream(IterableDataset[list[Item]]):
    """The stages in order: for each step the part of its batch that this process trains on.

    Step ``s`` draws from its own generators, so that the data of a step depends on neither the number of
    processes nor on where a resumed run starts. Loader process ``k`` of ``n`` makes the batches of
    steps k, k + n, ...: the order in which ``DataLoader`` asks for them (with one pass per step; with several
    there must be one loader process).

    Args:
        config: the recipe.
        first_step: where a resumed run goes on; what came before is not made again.
        share: of this process.
    """

    def __init__(self, config: TrainConfig, first_step: int = 0, share: Share | None = None) -> None:
        self.config, self.first_step, self.share = config, first_step, share or Share()
        self.sources: list[list[Source]] = [
            [source_of(data, config.seed) for data in stage.data] for stage in config.schedule
        ]

    def __iter__(self) -> Iterator[list[Item]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        step = -1
        for number, stage in enumerate(self.config.schedule):
            for _ in range(stage.steps):
                step += 1
                if step >= self.first_step and (step - self.first_step) % stride == offset:
                    yield from self.share.of(self._batch(number, stage, step))

    def _batch(self, number: int, stage: StageConfig, step: int) -> list[Item]:
        config = self.config
        rng, exits, mixing = (random.Random(f"{config.seed}/{step}{use}") for use in ("", "/exits", "/mix"))
        # One kind to a batch: little of it is padding.
        chosen = rng.randrange(len(stage.data))
        chains_after = rng.randint(0, config.chain_spread)
        plan = LoopPlan(config.iterations(stage, rng), stage.backprop, chains_after)
        length = min(config.chain_length, stage.longest) if stage.data[chosen].graphs else 0
        items = []
        for example in self.sources[number][chosen].draw(step, config.optimizer.batch_size, rng):
            chains = draw_chains(example, config.chains, length, rng)
            late = exits.random()
            put = stage
            if stage.mix and mixing.random() < stage.mix:
                put = config.schedule[mixing.randrange(number + 1)]
            replaced = 0 if config.chain_of_thought else 10**6 if put.replaced == "all" else put.replaced
            items.append(
                Item(
                    example,
                    plan,
                    chains,
                    exit=_exit(stage, plan, min(replaced, len(example.steps)) * config.thoughts_per_step, late),
                    replaced=replaced,
                    removed=put.removed_tokens,
                    short=exits.randint(1, plan.iterations - 1) if plan.iterations > 1 else 0,
                )
            )
        return items


def _exit(stage: StageConfig, plan: LoopPlan, work: int, late: float) -> int:
    if stage.exit == "last":
        return plan.iterations
    if stage.exit == "own":
        return min(plan.iterations, work)
    return min(plan.iterations, work + 1 + int(late * max(0, plan.iterations - work)))


class Collator:
    """Items to tensors, ids long, padded on the right.

    The batch holds, for B rows: ``input_ids``, ``attention_mask`` ``[B, L]``, the prompts; ``answer_ids``
    ``[B, A]``, what follows the loop (the config's answer prefix, steps left in words, answer, end token; padded with
    -100), and ``labels``, the same without the prefix; ``first`` ``[B]``, the answer's own first token; ``work``
    ``[B]``, iterations that the question needs; ``exits`` ``[B]``, iterations after which the text is written;
    ``short`` ``[B]``; ``plan`` (a :class:`LoopPlan`). Where an objective asks for them: ``step_ids`` ``[B, K, S]``
    and ``in_loop`` ``[B, K]``, the chain's steps and which of them the loop stands for; ``cot_ids`` ``[B, C]``,
    chain, mark, answer and end token, and ``step_ends`` ``[B, K]``, ``mark_at`` ``[B]`` in it. Where there are graphs:
    ``targets`` ``[B, T, K]``, the token set that state t should read as, padded with -100; and for the chains
    ``chain_starts`` ``[B, Q, 2]`` and ``chain_targets`` ``[B, Q, S, K]``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, text: TextConfig | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text or TextConfig()
        self.per_step, self.terms = config.thoughts_per_step, config.objectives
        self.in_words = bool(self.terms.cot or self.terms.cot_states or self.terms.codi)
        self.node = NodeTokens(tokenizer)

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """The batch of one pass."""
        examples, plan = [item.example for item in items], items[0].plan
        prompts = self.tokenizer(
            [self.text.wrap_prompt(example.question) for example in examples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        prefix = self._ids([self.text.answer_prefix])[0] if self.text.answer_prefix else []
        steps = self._steps(examples)
        alone = self._ids([example.answer for example in examples])
        after = self._ids([f" {example.answer}" for example in examples])
        ends = [[] if example.extra.get(CONTINUES) else [self._eos()] for example in examples]
        chains = [self._left(item, own) for item, own in zip(items, steps, strict=True)]
        mark = self._mark() if any(chains) else []
        written = [
            [*chain, *mark, *there, *end] if chain else [*here, *end]
            for chain, here, there, end in zip(chains, alone, after, ends, strict=True)
        ]
        batch = {
            "input_ids": prompts["input_ids"],
            "attention_mask": prompts["attention_mask"],
            "answer_ids": pad([[*prefix, *row] for row in written]),
            "labels": pad([[IGNORE] * len(prefix) + row for row in written]),
            "first": torch.tensor([row[0] for row in alone]),
            "work": torch.tensor([len(own) * self.per_step for own in steps]),
            "exits": torch.tensor([item.exit for item in items]),
            "short": torch.tensor([item.short for item in items]),
            "plan": plan,
        }
        if self.terms.steps or self.terms.thoughts or self.terms.cot_states:
            batch["step_ids"] = pad(steps) if any(steps) else torch.full((len(items), 1, 1), IGNORE)
            order = torch.arange(batch["step_ids"].shape[1])
            kept = [min(item.replaced, len(own)) for item, own in zip(items, steps, strict=True)]
            batch["in_loop"] = order < torch.tensor(kept)[:, None]
        if self.in_words:
            batch |= self._words(steps, after, ends)
        if self.terms.frontier and plan.iterations:
            batch["targets"] = pad(
                [self._levels(example, plan.iterations, row[0]) for example, row in zip(examples, alone, strict=True)]
            )
        if self.terms.chains and items[0].chains:
            batch["chain_starts"] = pad([[self._pair(start) for start, _ in item.chains] for item in items])
            levels = [[[self.node.all(level) for level in chain] for _, chain in item.chains] for item in items]
            batch["chain_targets"] = pad(levels)
        return batch

    def _steps(self, examples: list[Example]) -> list[list[list[int]]]:
        # Step by step, so that every step has tokens of its own.
        texts = [f" {step}" if i else step for example in examples for i, step in enumerate(example.steps)]
        ids = iter(self._ids(texts))
        return [[next(ids) for _ in example.steps] for example in examples]

    def _left(self, item: Item, steps: list[list[int]]) -> list[int]:
        if item.removed is not None:
            return [token for step in steps for token in step][item.removed :]
        return [token for step in steps[item.replaced :] for token in step]

    def _words(
        self, steps: list[list[list[int]]], answers: list[list[int]], ends: list[list[int]]
    ) -> dict[str, Tensor]:
        mark, rows, step_ends, mark_at = self._mark(), [], [], []
        for own, answer, end in zip(steps, answers, ends, strict=True):
            at, places = -1, []
            for step in own:
                at += len(step)
                places.append(at)
            step_ends.append(places)
            mark_at.append(at + len(mark))
            rows.append([*(token for step in own for token in step), *mark, *answer, *end])
        return {"cot_ids": pad(rows), "step_ends": pad(step_ends), "mark_at": torch.tensor(mark_at)}

    def _levels(self, example: Example, iterations: int, answer: int) -> list[list[int]]:
        sets = [self.node.all(level) for level in frontiers(example)[1 : iterations + 1]]
        return sets + [[answer]] * (iterations - len(sets))

    def _pair(self, start: tuple[str, ...]) -> list[int]:
        return [self.node(start[0]), self.node(start[-1])]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    def _mark(self) -> list[int]:
        return self._ids([f" {MARK}"])[0]

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def pad(nested: list[Any]) -> Tensor:
    """A nested list of integers as a dense tensor, padded with -100."""
    shape: list[int] = []
    level: list[Any] = nested
    while any(isinstance(x, list) for x in level):
        shape.append(max(map(len, level)))
        level = [x for inner in level for x in inner]
    full = torch.full([len(nested), *shape], IGNORE)
    _fill(full, nested)
    return full


def _fill(target: Tensor, nested: list[Any]) -> None:
    for row, values in zip(target, nested, strict=False):
        if values and isinstance(values[0], list):
            _fill(row, values)
        elif isinstance(values, list) and values:
            row[: len(values)] = torch.tensor(values, dtype=torch.long)
        elif not isinstance(values, list):
            row.fill_(values)
