"""The batches of a run: examples drawn and tokenized by a data loader process."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from slr_core.config import TextConfig
from slr_core.errors import DataError
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import frontiers
from slr_core.training.config import TrainConfig
from slr_core.training.graphs import Chain, NodeTokens, draw_chains
from slr_core.training.sources import CONTINUES, Listed, Source, open_source
from slr_core.training.stages import StageConfig

_CHECKED = 16  # longest questions of a list, by characters
IGNORE = -100
"""Padding of labels and target sets."""
MARK = "#"
"""Separates written steps from the answer, as in the published evaluation of ProsQA."""


@dataclass(frozen=True)
class LoopPlan:
    """The loop of a batch.

    Attributes:
        iterations: loop length of every row.
        backprop: number of last iterations that get gradients; ``None``: all.
        exit: the iteration after which a row's text is written, see :class:`~slr_core.training.stages.StageConfig`.
        chains_after: the chains of the objective `chains` begin at iteration ``chains_after + 1``.
        without: objectives that the stage leaves out.
    """

    iterations: int
    backprop: int | None = None
    exit: Literal["late", "own", "last"] = "late"
    chains_after: int = 0
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """An example and its part in the loop of a batch.

    Attributes:
        example: the question.
        plan: the loop of the whole batch.
        chains: other start nodes in its graph, for the objective `chains`.
        position: where a late exit lies among the iterations after the last needed one, 0 to 1.
        replaced: number of leading steps that the loop replaces.
        removed: number of leading tokens of the chain to leave out, instead of whole steps; ``None``: none.
        short: length of the shorter loop of the objective `shortcut`; 0: there is none.
    """

    example: Example
    plan: LoopPlan
    chains: tuple[Chain, ...] = ()
    position: float = 0.0
    replaced: int = 10**6
    removed: int | None = None
    short: int = 0

    def exit_after(self, work: int) -> int:
        """The iteration after which the text is written, if the question needs ``work`` iterations."""
        last = self.plan.iterations
        if self.plan.exit == "last":
            return last
        return min(last, work if self.plan.exit == "own" else work + 1 + int(self.position * max(0, last - work)))


@dataclass(frozen=True)
class Share:
    """The part of every batch that one process trains on.

    Attributes:
        process: index of this process, from 0.
        processes: number of processes.
        passes: number of forward passes per optimizer step (gradient accumulation).
    """

    process: int = 0
    processes: int = 1
    passes: int = 1

    def split(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """The items of each pass. Rows are dealt in turn: a batch sorted by length gives parts of like length."""
        mine = items[self.process :: self.processes]
        return (list(mine[i :: self.passes]) for i in range(self.passes))


class StageStream(IterableDataset[list[Item]]):
    """For each optimizer step, the part of its batch that this process trains on.

    Each step seeds its own random generators: the data of a step depends neither on the number of processes nor on
    the step at which a run was resumed. Loader process ``k`` of ``n`` makes the batches of steps k, k + n, ..., the
    order in which ``DataLoader`` reads them. With several passes per step there must be one loader process.

    Args:
        config: the recipe.
        first_step: the step at which a run is resumed; earlier batches are not made.
        share: the part of this process; ``None``: the whole batch.
    """

    def __init__(self, config: TrainConfig, first_step: int = 0, share: Share | None = None) -> None:
        self.config, self.first_step, self.share = config, first_step, share or Share()
        self.sources: list[list[Source]] = [
            [open_source(data, config.seed, config.held_out) for data in stage.data] for stage in config.schedule
        ]

    def __iter__(self) -> Iterator[list[Item]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        step = -1
        for number, stage in enumerate(self.config.schedule):
            for _ in range(stage.steps):
                step += 1
                if step >= self.first_step and (step - self.first_step) % stride == offset:
                    yield from self.share.split(self._batch(number, stage, step))

    def _batch(self, number: int, stage: StageConfig, step: int) -> list[Item]:
        config = self.config
        rng, exits, mixing = (random.Random(f"{config.seed}/{step}{use}") for use in ("", "/exits", "/mix"))
        # One source per batch, to need little padding.
        chosen = rng.randrange(len(stage.data))
        chains_after = rng.randint(0, config.chain_spread)
        plan = LoopPlan(config.iterations(stage, rng), stage.backprop, stage.exit, chains_after, stage.without)
        length = min(config.chain_length, stage.longest) if stage.data[chosen].graphs else 0
        items = []
        for example in self.sources[number][chosen].draw(step, config.optimizer.batch_size, rng):
            chains = draw_chains(example, config.chains, length, rng)
            position = exits.random()
            replacing = stage
            if stage.mix and mixing.random() < stage.mix:
                replacing = config.schedule[mixing.randrange(number + 1)]
            replaced = 0 if config.chain_of_thought else 10**6 if replacing.replaced == "all" else replacing.replaced
            items.append(
                Item(
                    example,
                    plan,
                    chains,
                    position=position,
                    replaced=replaced,
                    removed=replacing.removed_tokens,
                    short=exits.randint(1, plan.iterations - 1) if plan.iterations > 1 else 0,
                )
            )
        return items


def check_longest(stream: StageStream, collator: Collator) -> None:
    """Collate the longest questions of each list, so that one that cannot be trained on is found before the training.

    Raises:
        DataError: there is such a question.
    """
    for stage, sources in zip(stream.config.schedule, stream.sources, strict=True):
        longest = (
            stage.longest if stream.config.max_iterations is None else min(stage.longest, stream.config.max_iterations)
        )
        replaced = 0 if stream.config.chain_of_thought else 10**6 if stage.replaced == "all" else stage.replaced
        for source in sources:
            if isinstance(source, Listed):
                most = nlargest(_CHECKED, source.examples, key=_characters)
                collator(
                    [
                        Item(example, LoopPlan(longest), replaced=replaced, removed=stage.removed_tokens)
                        for example in most
                    ]
                )


def unknown_share(stream: StageStream, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the first batch's tokens that stand for words that the tokenizer does not know."""
    texts = [
        text
        for item in next(iter(stream), [])
        for text in (item.example.question, *item.example.steps, item.example.answer)
    ]
    if not texts or tokenizer.unk_token_id is None:
        return 0.0
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row]
    return ids.count(tokenizer.unk_token_id) / max(1, len(ids))


def _characters(example: Example) -> int:
    return len(example.question) + len(example.answer) + sum(map(len, example.steps))


class Collator:
    """Turns items into a batch of tensors: int64, padded on the right, prompts with the pad token, the rest with -100.

    Always, for B rows:

    - ``input_ids``, ``attention_mask`` ``[B, L]``: the prompts.
    - ``answer_ids`` ``[B, A]``: the text after the loop: answer prefix, remaining steps, answer, end token.
    - ``labels`` ``[B, A]``: ``answer_ids`` with -100 at the prefix.
    - ``first`` ``[B]``: the first token of the answer itself.
    - ``work`` ``[B]``: iterations that the question needs: ``iterations_per_step`` times its steps; where each thought
      is a token (``supervised: chain`` in the workspace ``append``), the one that reads as the mark.
    - ``exits`` ``[B]``: the iteration after which the text is written.
    - ``short`` ``[B]``: see :class:`Item`.
    - ``plan``: a :class:`LoopPlan`.

    If an objective needs them:

    - ``step_ids`` ``[B, K, S]``: the chain's steps; ``in_loop`` ``[B, K]`` bool: those that the loop replaces.
    - ``cot_ids`` ``[B, C]``: all steps, mark, answer, end token; ``step_ends`` ``[B, K]`` and ``mark_at`` ``[B]``:
      indices into it of each step's last token and of the mark's last.
    - ``targets`` ``[B, T, K]``: the set of tokens at distance t in the question's graph.
    - ``chain_starts`` ``[B, Q, 2]``, ``chain_targets`` ``[B, Q, S, K]``: the same for other start nodes.

    Args:
        tokenizer: pads with any token.
        config: the recipe.
        text: prefixes and suffixes; by default none.
        room: positions for prompt and answer together, by number of iterations; by default any number.
        by_token: whether each thought stands for a token of the chain.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        text: TextConfig | None = None,
        room: Sequence[int] = (),
        *,
        by_token: bool = False,
    ) -> None:
        self.tokenizer, self.text, self.room = tokenizer, text or TextConfig(), room
        self.per_step, self.terms = config.iterations_per_step, config.objectives
        self.reads_chain, self.by_token = config.reads_chain, by_token
        self.node = NodeTokens(tokenizer)

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """The batch of one forward pass.

        Raises:
            DataError: a question without tokens, one that is too long for the model, a graph whose nodes are not
                single tokens, or a tokenizer without the separator of written steps.
        """
        examples, plan = [item.example for item in items], items[0].plan
        prompts = self.tokenizer(
            [self.text.wrap_prompt(example.question) for example in examples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        prefix = self._ids([self.text.answer_prefix])[0] if self.text.answer_prefix else []
        steps = self._steps(examples)
        answers = self._ids([example.answer for example in examples])
        spaced_answers = self._ids([f" {example.answer}" for example in examples])
        ends = [[] if example.extra.get(CONTINUES) else [self._eos()] for example in examples]
        replaced = [ids[: item.replaced] for item, ids in zip(items, steps, strict=True)]
        chains = [self._remaining_steps(item, ids) for item, ids in zip(items, steps, strict=True)]
        mark = self._mark() if any(chains) else []
        written = [
            [*chain, *mark, *spaced, *end] if chain else [*answer, *end]
            for chain, answer, spaced, end in zip(chains, answers, spaced_answers, ends, strict=True)
        ]
        lengths = prompts["attention_mask"].sum(1).tolist()
        self._check_lengths(examples, lengths, [len(prefix) + len(w) for w in written], plan)
        batch = {
            "input_ids": prompts["input_ids"],
            "attention_mask": prompts["attention_mask"],
            "answer_ids": pad([[*prefix, *row] for row in written]),
            "labels": pad([[IGNORE] * len(prefix) + row for row in written]),
            "first": torch.tensor([row[0] for row in answers]),
            "work": torch.tensor(self._work(steps)),
            "exits": torch.tensor(
                [item.exit_after(work) for item, work in zip(items, self._work(replaced), strict=True)]
            ),
            "short": torch.tensor([item.short for item in items]),
            "plan": plan,
        }
        if self.terms.steps or self.terms.thoughts or self.terms.cot_states:
            batch["step_ids"] = pad(steps) if any(steps) else torch.full((len(items), 1, 1), IGNORE)
            order = torch.arange(batch["step_ids"].shape[1])
            batch["in_loop"] = order < torch.tensor([len(ids) for ids in replaced])[:, None]
        if self.reads_chain:
            batch |= self._chain_of_thought(steps, spaced_answers, ends)
            self._check_lengths(examples, lengths, (batch["cot_ids"] != IGNORE).sum(1).tolist(), LoopPlan(0))
        if self.terms.frontier and plan.iterations:
            batch["targets"] = pad(
                [self._levels(example, plan.iterations, row[0]) for example, row in zip(examples, answers, strict=True)]
            )
        if self.terms.chains and items[0].chains:
            batch["chain_starts"] = pad([[self._pair(start) for start, _ in item.chains] for item in items])
            levels = [[[self.node.all(level) for level in chain] for _, chain in item.chains] for item in items]
            batch["chain_targets"] = pad(levels)
        return batch

    def _check_lengths(self, examples: list[Example], prompts: list[int], answers: list[int], plan: LoopPlan) -> None:
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            if prompt == 0:
                raise DataError(f"a question holds no tokens of this model: {example.question[:80]!r}")
            if self.room and prompt + answer > self.room[plan.iterations]:
                raise DataError(
                    f"a question of {prompt} tokens and the {answer} written after it do not fit: with "
                    f"{plan.iterations} iterations the model has {self.room[plan.iterations]} positions for both: "
                    f"{example.question[:80]!r}"
                )

    def _steps(self, examples: list[Example]) -> list[list[list[int]]]:
        # Tokenize each step alone, so that no token spans two steps.
        texts = [f" {step}" if i else step for example in examples for i, step in enumerate(example.steps)]
        ids = iter(self._ids(texts))
        return [[next(ids) for _ in example.steps] for example in examples]

    def _work(self, steps: list[list[list[int]]]) -> list[int]:
        """Iterations that each question needs to go through these steps."""
        if self.by_token:
            return [sum(map(len, ids)) + len(self._mark()) - 1 for ids in steps]
        return [len(ids) * self.per_step for ids in steps]

    def _remaining_steps(self, item: Item, steps: list[list[int]]) -> list[int]:
        if item.removed is not None:
            return [token for step in steps for token in step][item.removed :]
        return [token for step in steps[item.replaced :] for token in step]

    def _chain_of_thought(
        self, steps: list[list[list[int]]], answers: list[list[int]], ends: list[list[int]]
    ) -> dict[str, Tensor]:
        mark, rows, step_ends, mark_at = self._mark(), [], [], []
        for chain, answer, end in zip(steps, answers, ends, strict=True):
            at, places = -1, []
            for step in chain:
                at += len(step)
                places.append(at)
            step_ends.append(places)
            mark_at.append(at + len(mark))
            rows.append([*(token for step in chain for token in step), *mark, *answer, *end])
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
        ids = mark_ids(self.tokenizer)
        if not ids:
            raise DataError(
                f"the base's tokenizer has no token for `{MARK}`, which separates written steps from the answer: train "
                "`full`, which adds one, on answers alone, or from another base"
            )
        return ids

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos


def mark_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the separator between written steps and answer; empty: the tokenizer has none for it."""
    ids: list[int] = tokenizer(f" {MARK}", add_special_tokens=False).input_ids
    return [] if tokenizer.unk_token_id in ids else ids


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
