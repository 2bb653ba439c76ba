"""Causal patching on ProsQA: replace one thought by the frontier of the rival, and see whether the answer follows.

The rival of a question is the other person from whom the wrong option can be reached in as many hops. If the frontier
in a thought is what the loop reasons with, a thought that holds the rival's frontier leads to the rival's answer
(interchange interventions: Vig et al., 2020; Geiger et al., 2021, arXiv 2106.02997).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from slr_core.errors import ConfigError
from slr_core.evaluation.interventions import patch_state
from slr_core.evaluation.statistics import wilson_interval
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import RunLoop, generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import ProsQA, distances, frontiers, graph_of
from slr_core.training.graphs import NodeTokens
from slr_core.types import Result

Patch = Literal["rival_thought", "rival_frontier", "own_frontier", "random_frontier"]
"""What replaces h_t: the rival's own h_t, from a loop on the same facts; or the mean embedding of the rival's frontier
at distance t, of the question's own frontier (a control that should change nothing), or of as many concepts of the
question, drawn at random from those in neither frontier (a control that should lead to neither answer)."""
PATCHES: tuple[Patch, ...] = get_args(Patch)


@dataclass(frozen=True)
class PatchScore:
    """The answers of a set of questions after one patch.

    Attributes:
        patch: what replaces the state; ``None``: nothing.
        t: the iteration whose state is replaced.
        questions: number of questions.
        own: share of answers with the question's right option.
        rival: share of answers with the rival's option.
        interval: 95 % Wilson interval of ``rival``.
    """

    patch: str | None
    t: int | None
    questions: int
    own: float
    rival: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class RivalPair:
    """A question and the same facts asked about its rival.

    Attributes:
        own: the question.
        rival: the question about the rival; its right option is the wrong one of ``own``.
    """

    own: Example
    rival: Example


def pair_with_rival(example: Example) -> RivalPair | None:
    """The question with its rival; ``None`` if no other person reaches the wrong option in as many hops."""
    graph, symbols = graph_of(example), example.extra["idx_to_symbol"]
    hops = len(frontiers(example)) - 1
    named = {child for _, child in graph.edges}
    for node in range(graph.nodes):
        reached = distances(graph.edges, node)
        if node != graph.root and node not in named and reached.get(graph.neg_target) == hops:
            if graph.target in reached:
                continue
            person, rival = symbols[graph.root], symbols[node]
            facts, asked, options = example.question.rpartition(f" Is {person} a ")
            if not asked:
                return None
            extra = {**example.extra, "root": node, "target": graph.neg_target, "neg_target": graph.target}
            answer = f"{rival} is a {symbols[graph.neg_target]}."
            return RivalPair(
                example, replace(example, question=f"{facts} Is {rival} a {options}", answer=answer, extra=extra)
            )
    return None


def measure_patching(
    reasoner: LatentReasoner,
    pairs: Sequence[RivalPair],
    *,
    iterations: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[PatchScore]:
    """Answer all questions without a patch, and with each patch at each iteration.

    Args:
        reasoner: a model of ProsQA in workspace ``append`` whose tokenizer has one token per name of a node.
        pairs: at least one.
        iterations: number of iterations of every loop; h_1 to h_iterations are patched, as far as frontiers reach.
        seed: seed of the random frontiers.
        batch_size: number of questions per batch; affects speed only.
        progress: called with the number of further answers that are done.

    Raises:
        ConfigError: the workspace is not ``append``.
        DataError: the tokenizer splits the names of nodes.
    """
    if reasoner.config.loop.workspace != "append":
        raise ConfigError(f"patching needs workspace `append`, got {reasoner.config.loop.workspace}")
    deepest = min(iterations, min(len(frontiers(pair.own)) for pair in pairs) - 1)
    counts: dict[tuple[str | None, int | None], list[int]] = {}
    node = NodeTokens(reasoner.tokenizer)
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        plain = _answer(reasoner, [pair.own for pair in chunk], iterations)
        rivals = _answer(reasoner, [pair.rival for pair in chunk], iterations)
        _count(counts, (None, None), chunk, plain)
        progress(len(chunk))
        for t in range(1, deepest + 1):
            for patch in PATCHES:
                rng = random.Random(f"{seed} {start} {t}")
                donors = [
                    _donor(reasoner, node, patch, pair, t, run, rival, rng)
                    for pair, run, rival in zip(chunk, plain, rivals, strict=True)
                ]
                run_loop = patch_state(reasoner, t, torch.stack(donors))
                _count(counts, (patch, t), chunk, _answer(reasoner, [pair.own for pair in chunk], iterations, run_loop))
                progress(len(chunk))
    return [
        PatchScore(patch, t, n, own / n, rival / n, wilson_interval(rival, n))
        for (patch, t), (n, own, rival) in counts.items()
    ]


def _answer(
    reasoner: LatentReasoner, examples: Sequence[Example], iterations: int, run_loop: RunLoop | None = None
) -> list[Result]:
    task, loop = ProsQA(), LoopParams(criterion="fixed", min_iterations=iterations, max_iterations=iterations)
    requests = [prepare(reasoner, task.prompt(example), loop, trace=True, include_states=True) for example in examples]
    return generate(reasoner, requests, run_loop=run_loop)


def _count(
    counts: dict[tuple[str | None, int | None], list[int]],
    key: tuple[str | None, int | None],
    pairs: Sequence[RivalPair],
    results: Sequence[Result],
) -> None:
    total = counts.setdefault(key, [0, 0, 0])
    for pair, result in zip(pairs, results, strict=True):
        words, symbols = re.findall(r"\w+", result.text), pair.own.extra["idx_to_symbol"]
        graph = graph_of(pair.own)
        total[0] += 1
        total[1] += symbols[graph.target] in words
        total[2] += symbols[graph.neg_target] in words


def _donor(
    reasoner: LatentReasoner,
    node: NodeTokens,
    patch: Patch,
    pair: RivalPair,
    t: int,
    own: Result,
    rival: Result,
    rng: random.Random,
) -> Tensor:
    """The state that replaces h_t of one question, ``[1, d]``, of the same norm as the one it replaces."""
    assert own.states is not None
    assert rival.states is not None
    replaced = own.states[t]
    if patch == "rival_thought":
        return rival.states[t]
    ours, theirs = frontiers(pair.own)[t], frontiers(pair.rival)[t]
    symbols = {"rival_frontier": theirs, "own_frontier": ours}.get(patch)
    if symbols is None:
        used = {*ours, *theirs}
        others = [name for name in pair.own.extra["idx_to_symbol"] if name not in used and not name[0].isupper()]
        symbols = rng.sample(others, min(len(others), len(theirs)))
    table = reasoner.base.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    mean = table[node.all(symbols)].float().mean(0, keepdim=True)
    scaled: Tensor = mean * (replaced.norm() / mean.norm())
    return scaled
