"""Logit lens, decoded thoughts, and the movement of the states.

The logit lens (nostalgebraist, 2020) applies the model's LM head to the state of every iteration. It needs no training
and shows which token a state would produce; a probe (:mod:`slr_core.evaluation.probes`) shows what a state contains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slr_core.errors import DataError
from slr_core.evaluation.probes import READOUT, CollectedStates
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example, Task
from slr_core.tasks.prosqa import ProsQA, frontiers
from slr_core.training.graphs import NodeTokens

COMMON = 5
"""Number of tokens and thoughts to list per iteration."""
SHOWN = 100
"""Number of questions whose trajectories are stored for a plot."""
EXAMPLES = 3
"""Number of questions whose readings are stored one by one."""
_ROWS = 64  # of the head at a time: vocabularies are large


@dataclass(frozen=True)
class LensReading:
    """The logit lens on the states of one iteration.

    Attributes:
        t: the iteration; 0 is h_0.
        questions: number of questions with a state at t.
        entropy: mean entropy, in nats.
        answer: mean probability of the first token of the final answer.
        settled: share of questions whose top token is that token.
        frontier: mean probability of the ProsQA frontier at distance t, over the questions that have one; ``None`` if
            none has, or if names of nodes are not single tokens.
        frontier_questions: number of questions that have one.
        common: the most frequent top tokens and their shares.
        thoughts: the most frequent decoded thoughts and their shares; empty without a latent decoder.
        thought_is_step: share of the decoded thoughts that equal step t of the question's chain, over the questions
            that have such a step; ``None`` without a latent decoder, or if none has.
    """

    t: int
    questions: int
    entropy: float
    answer: float
    settled: float
    frontier: float | None
    frontier_questions: int
    common: tuple[tuple[str, float], ...]
    thoughts: tuple[tuple[str, float], ...]
    thought_is_step: float | None = None


@dataclass(frozen=True)
class QuestionReadings:
    """The logit lens on one question, iteration by iteration.

    Attributes:
        question: its text.
        text: the answer.
        right: whether the task accepts the answer.
        first: the iteration of the first reading: 0 if h_0 is a state, else 1.
        readings: the top token of each iteration from ``first`` on, and its probability.
        thoughts: the decoded thoughts from iteration 1 on; ``None`` without a latent decoder.
    """

    question: str
    text: str
    right: bool
    first: int
    readings: tuple[tuple[str, float], ...]
    thoughts: tuple[str | None, ...]


@dataclass(frozen=True)
class Lens:
    """The logit lens on a set of questions.

    Attributes:
        readings: per iteration, over all questions.
        by_difficulty: the same per number of reasoning steps, ascending.
        examples: the first questions, one by one.
    """

    readings: tuple[LensReading, ...]
    by_difficulty: dict[int, tuple[LensReading, ...]]
    examples: tuple[QuestionReadings, ...]


@dataclass(frozen=True)
class _Raw:
    """Values per question and iteration, ``[N, T + 1]``; NaN if undefined."""

    usable: Tensor
    entropy: Tensor
    answer: Tensor
    frontier: Tensor
    top: Tensor
    confidence: Tensor


@torch.inference_mode()
def read_lens(reasoner: LatentReasoner, task: Task, examples: Sequence[Example], collected: CollectedStates) -> Lens:
    """Apply the LM head to every state at the position from which the next token is read.

    Args:
        reasoner: the model of the states.
        task: the task of the questions.
        examples: the questions, in order.
        collected: their states.
    """
    raw = _through_head(reasoner, collected, _frontier_tokens(reasoner, task, examples))
    levels = [task.difficulty(example) for example in examples]
    everyone = list(range(len(examples)))
    of_level = {level: [i for i in everyone if levels[i] == level] for level in sorted(set(levels))}
    return Lens(
        readings=_readings(reasoner, collected, raw, examples, everyone),
        by_difficulty={level: _readings(reasoner, collected, raw, examples, rows) for level, rows in of_level.items()},
        examples=tuple(_question_readings(reasoner, collected, raw, examples, i) for i in everyone[:EXAMPLES]),
    )


def _frontier_tokens(reasoner: LatentReasoner, task: Task, examples: Sequence[Example]) -> list[list[list[int]]] | None:
    """Per question and distance, the tokens that name its nodes in training."""
    if not isinstance(task, ProsQA):
        return None
    node = NodeTokens(reasoner.tokenizer)
    levels = [frontiers(example) for example in examples]
    try:
        return [[node.all(level) for level in question] for question in levels]
    except DataError:
        return None  # this tokenizer splits the names of nodes


def _through_head(reasoner: LatentReasoner, collected: CollectedStates, frontier: list[list[list[int]]] | None) -> _Raw:
    states = collected.states[READOUT]
    questions, times = states.shape[:2]
    usable = states.isfinite().all(-1)

    def blank() -> Tensor:
        return torch.full((questions, times), torch.nan)

    raw = _Raw(usable, blank(), blank(), blank(), torch.zeros(questions, times, dtype=torch.long), blank())
    weight = reasoner.base.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    for t in range(times):
        for rows in torch.split(usable[:, t].nonzero()[:, 0], _ROWS):
            logits = reasoner.head(states[rows, t].to(weight.device, weight.dtype)).float().cpu()
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            raw.entropy[rows, t] = -(p * log_p).nan_to_num().sum(-1)
            raw.answer[rows, t] = p.gather(-1, collected.tokens[rows, None])[:, 0]
            raw.confidence[rows, t], raw.top[rows, t] = p.max(-1)
            if frontier is not None:
                for i, row in enumerate(rows.tolist()):
                    if t < len(frontier[row]):
                        raw.frontier[row, t] = p[i, frontier[row][t]].sum()
    return raw


def _readings(
    reasoner: LatentReasoner, collected: CollectedStates, raw: _Raw, examples: Sequence[Example], rows: list[int]
) -> tuple[LensReading, ...]:
    readings = []
    for t in range(collected.iterations + 1):
        here = torch.tensor([row for row in rows if raw.usable[row, t]], dtype=torch.long)
        if len(here) == 0:
            continue
        reached = raw.frontier[here, t]
        reached = reached[~reached.isnan()]
        tops = Counter(raw.top[here, t].tolist())
        spoken = {row: thought for row in rows if (thought := _thought(collected, row, t)) is not None}
        thoughts = Counter(spoken.values())
        matches = [
            thought.strip() == examples[row].steps[t - 1].strip()
            for row, thought in spoken.items()
            if t <= len(examples[row].steps)
        ]
        readings.append(
            LensReading(
                t=t,
                questions=len(here),
                entropy=float(raw.entropy[here, t].mean()),
                answer=float(raw.answer[here, t].mean()),
                settled=float((raw.top[here, t] == collected.tokens[here]).float().mean()),
                frontier=float(reached.mean()) if len(reached) else None,
                frontier_questions=len(reached),
                common=tuple((_word(reasoner, token), count / len(here)) for token, count in _most(tops)),
                thoughts=tuple((thought, count / thoughts.total()) for thought, count in _most(thoughts)),
                thought_is_step=sum(matches) / len(matches) if matches else None,
            )
        )
    return tuple(readings)


def _most(counts: Counter[Any]) -> list[tuple[Any, int]]:
    # Ties in alphabetical order: the order of the questions must not matter.
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:COMMON]


def _thought(collected: CollectedStates, row: int, t: int) -> str | None:
    records = collected.records[row]
    return records[t - 1].thought if 0 < t <= len(records) else None


def _word(reasoner: LatentReasoner, token: int) -> str:
    return str(reasoner.tokenizer.decode([token]))


def _question_readings(
    reasoner: LatentReasoner, collected: CollectedStates, raw: _Raw, examples: Sequence[Example], row: int
) -> QuestionReadings:
    times = raw.usable[row].nonzero()[:, 0].tolist()
    return QuestionReadings(
        question=examples[row].question,
        text=collected.texts[row],
        right=collected.right[row],
        first=times[0] if times else 0,
        readings=tuple((_word(reasoner, int(raw.top[row, t])), float(raw.confidence[row, t])) for t in times),
        thoughts=tuple(record.thought for record in collected.records[row]),
    )


# -- how states move --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quartiles:
    """The quartiles of a quantity over many questions."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Movement:
    """How far the states moved at iteration 1, 2, ...; ``None`` if undefined for every question.

    Attributes:
        relative_change: norm of the step divided by the norm of the state before it.
        contraction: norm of the step divided by the norm of the step before it.
    """

    relative_change: tuple[Quartiles | None, ...]
    contraction: tuple[Quartiles | None, ...]


def measure_movement(collected: CollectedStates) -> Movement:
    """Quartiles of what the loops measured, over all questions."""
    return Movement(
        *(
            tuple(
                _spread([getattr(records[t], name) for records in collected.records if len(records) > t])
                for t in range(collected.iterations)
            )
            for name in ("relative_change", "contraction")
        )
    )


def _spread(values: Sequence[float | None]) -> Quartiles | None:
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if len(known) == 0:
        return None
    return Quartiles(*known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist())


Point = tuple[float, float]


@dataclass(frozen=True)
class Trajectories:
    """States in the plane of their first two principal components, over all questions and iterations.

    Attributes:
        explained: the components' shares of the variance.
        first: the iteration of the first point of every path.
        paths: the mean path per difficulty, one point per iteration.
        points: the paths of the first :data:`SHOWN` questions, with their difficulty.
    """

    explained: tuple[float, float]
    first: int
    paths: dict[int, tuple[Point, ...]]
    points: tuple[tuple[int, tuple[Point, ...]], ...]


def project_trajectories(collected: CollectedStates, task: Task, examples: Sequence[Example]) -> Trajectories | None:
    """Project the states of all questions whose loop ran to its end; ``None`` for fewer than two questions."""
    states = collected.states[READOUT].double()
    first = 1 if states[:, 0].isnan().all() else 0
    complete = states[:, first:].isfinite().all(-1).all(-1)
    if complete.sum() < 2:
        return None
    levels = [task.difficulty(example) for example, ran in zip(examples, complete.tolist(), strict=True) if ran]
    paths = states[complete][:, first:]
    flat = paths.flatten(0, 1)
    centred = flat - flat.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, [-1, -2]]
    # The sign of a principal component is arbitrary; its largest entry becomes positive.
    largest = axes.abs().argmax(0)
    axes = axes * axes[largest, torch.arange(2)].sign()
    plane = (centred @ axes).unflatten(0, paths.shape[:2])
    total = float(variances.clamp_min(0).sum()) or 1.0
    return Trajectories(
        explained=(float(variances[-1]) / total, float(variances[-2]) / total),
        first=first,
        paths={
            level: _points(plane[torch.tensor([other == level for other in levels])].mean(0))
            for level in sorted(set(levels))
        },
        points=tuple((level, _points(path)) for level, path in zip(levels[:SHOWN], plane[:SHOWN], strict=True)),
    )


def _points(path: Tensor) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in path.tolist())
