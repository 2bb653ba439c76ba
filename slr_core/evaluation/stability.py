"""Measure whether a loop is stable and whether it stops at the right time.

Every loop is forced to every depth, which gives an answer at each. From these answers and the distances between states
follow the cost and the accuracy of every exit criterion and threshold, without further runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Self, get_args

import torch

from slr_core.config import DEFAULT_THRESHOLDS, Criterion
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, NOISY_START, Method, MethodSettings
from slr_core.evaluation.outcomes import Outcome
from slr_core.evaluation.run import run_method, run_spec
from slr_core.evaluation.statistics import Summary, rank_correlation, summarize
from slr_core.evaluation.store import Store
from slr_core.generation.decoding import pad_ids
from slr_core.loop.convergence import ExitRule, measure
from slr_core.loop.workspace import readout
from slr_core.params import ResolvedLoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Task
from slr_core.tasks.sources import Questions
from slr_core.types import finite_or_none
from slr_core.validation import from_stored

NOISES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Amounts of noise added to h_0, as shares of its RMS."""
THRESHOLDS = 12
"""Number of thresholds per criterion, spread over the quantiles of the measured distances."""
PAST = 4
"""Largest forced depth, as a multiple of the trained depth."""

Distance = dict[str, float | None]
"""The measures of one iteration, by the names of :class:`slr_core.loop.convergence.Distances`."""


@dataclass(frozen=True)
class ExitPoint:
    """One criterion at one threshold.

    Attributes:
        criterion: name of the exit criterion.
        threshold: in the unit of the criterion.
        iterations: mean number of iterations.
        accuracy: accuracy of the answers at the exits.
        excess: mean number of iterations beyond the first one from which the answer no longer changes.
    """

    criterion: str
    threshold: float
    iterations: float
    accuracy: float
    excess: float


@dataclass(frozen=True)
class StabilityReport:
    """The results of a :class:`StabilityStudy`.

    Attributes:
        trained: number of trained iterations.
        by_depth: figures of loops forced to 0, 1, 2, ... iterations.
        noise: per amount of noise in h_0, the figures and the share of answers that changed.
        default: figures of the loop as configured.
        excess: mean excess iterations of the loop as configured.
        correlation: rank correlation of its iterations with difficulty; ``None`` if one of them is constant.
        exits: every criterion at its thresholds.
    """

    trained: int
    by_depth: dict[int, Summary]
    noise: dict[float, tuple[Summary, float]]
    default: Summary
    excess: float
    correlation: float | None
    exits: list[ExitPoint]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: ``data`` is something else.
        """
        return from_stored(cls, data)


def best_exits(exits: Sequence[ExitPoint]) -> list[ExitPoint]:
    """Per criterion, in order of the iterations: the points with a higher accuracy than all points with fewer."""
    best: list[ExitPoint] = []
    for criterion in dict.fromkeys(exit.criterion for exit in exits):
        points = sorted((e for e in exits if e.criterion == criterion), key=lambda e: (e.iterations, -e.accuracy))
        for number, point in enumerate(points):
            if all(point.accuracy > earlier.accuracy for earlier in points[:number]):
                best.append(point)
    return best


class StabilityStudy:
    """Measures the stability of a model on a set of questions.

    Args:
        local: the model.
        task: puts the questions and grades the answers.
        questions: the questions to answer.
        model: name and hash of the model, from :func:`slr_core.evaluation.run.identify_model`.
        store: stores every outcome, so that an interrupted study can continue.
        batch_size: number of questions per batch.
        progress: called with the name of a run and the number of further questions that are done.
    """

    def __init__(
        self,
        local: Local,
        task: Task,
        questions: Questions,
        model: dict[str, Any],
        store: Store,
        *,
        batch_size: int = 64,
        progress: Callable[[str, int], None] = lambda name, answered: None,
    ) -> None:
        self.local, self.task, self.questions = local, task, questions
        self.model, self.store, self.batch_size, self.progress = model, store, batch_size, progress

    def run(self, past: int = PAST, seed: int = 0) -> StabilityReport:
        """Run all measurements; the loop is forced to up to ``past`` times its trained depth."""
        loop = self.local.reasoner.config.loop
        plain = MethodSettings({}, seed=seed)
        depths = [
            self._answers(METHODS["slr_fixed"], replace(plain, loop=_forced(t)), f"depth {t}")
            for t in range(past * loop.trained_iterations + 1)
        ]
        default = self._answers(METHODS["slr"], plain, "as configured")
        noise = {}
        for scale in NOISES:
            noisy = self._answers(NOISY_START, replace(plain, noise=scale), f"noise {scale:g}")
            noise[scale] = summarize(noisy), fmean(a.text != b.text for a, b in zip(noisy, default, strict=True))
        settled = [
            _settled([depth[i].text for depth in depths[: loop.max_iterations + 1]]) for i in range(len(default))
        ]
        return StabilityReport(
            trained=loop.trained_iterations,
            by_depth={t: summarize(outcomes) for t, outcomes in enumerate(depths)},
            noise=noise,
            default=summarize(default),
            excess=fmean(o.iterations - first for o, first in zip(default, settled, strict=True)),
            correlation=rank_correlation([o.iterations for o in default], [float(o.difficulty) for o in default]),
            exits=self._exits(depths[: loop.max_iterations + 1], settled),
        )

    def _answers(self, method: Method, settings: MethodSettings, name: str) -> list[Outcome]:
        spec = run_spec(method, settings, self.task, self.questions, self.model)
        return run_method(
            method,
            self.local,
            self.task,
            self.questions.examples,
            settings,
            store=self.store,
            run=self.store.open(spec),
            batch_size=self.batch_size,
            progress=lambda count: self.progress(name, count),
        )

    def _exits(self, depths: list[list[Outcome]], settled: list[int]) -> list[ExitPoint]:
        max_iterations = len(depths) - 1
        if max_iterations == 0:
            return []
        paths: list[list[Distance]] = []
        for start in range(0, len(self.questions.examples), self.batch_size):
            texts = [self.task.prompt(example) for example in self.questions.examples[start : start + self.batch_size]]
            paths += measure_distances(self.local.reasoner, texts, max_iterations)
            self.progress("distances", len(texts))
        guard = self.local.reasoner.config.loop.guard
        exits = []
        for criterion in get_args(Criterion):
            for threshold in _thresholds(criterion, [d.get(criterion) for path in paths for d in path]):
                settings = ResolvedLoopParams(max_iterations, 1, criterion, threshold, 1)
                at = [_exit(path, ExitRule(settings, guard)) for path in paths]
                right = [depths[kept_iteration][i].correct for i, (_, kept_iteration) in enumerate(at)]
                excess = fmean(ran - first for (ran, _), first in zip(at, settled, strict=True))
                exits.append(ExitPoint(criterion, threshold, fmean(ran for ran, _ in at), fmean(right), excess))
        return exits


@torch.inference_mode()
def measure_distances(reasoner: LatentReasoner, prompts: Sequence[str], iterations: int) -> list[list[Distance]]:
    """Per prompt, the measures of every iteration of a loop that runs to ``iterations``."""
    text = reasoner.config.text
    ids = [reasoner.tokenizer(text.wrap_prompt(prompt)).input_ids for prompt in prompts]
    context = reasoner.encode(*pad_ids(ids, reasoner.device))
    head = reasoner.log_probs(readout(context.hidden, context.valid_mask)) if reasoner.is_state(0) else None
    paths: list[list[Distance]] = [[] for _ in prompts]
    survival: torch.Tensor | None = None
    for t in range(1, iterations + 1):
        previous, before = context.hidden, head
        g, h = reasoner.iterate(context, t)
        head = reasoner.log_probs(readout(h, context.valid_mask))
        (g, _), (previous, _) = (reasoner.workspace.measured(x, context.valid_mask) for x in (g, previous))
        h, valid_mask = reasoner.workspace.measured(h, context.valid_mask)
        measured = measure(
            h,
            valid_mask,
            previous=previous if reasoner.is_state(t - 1) else None,
            compared=reasoner.compared_state(g, h),
            head=head,
            head_before=before,
            p_halt=None if reasoner.halting is None else reasoner.halting(h, valid_mask),
            survival_before=survival,
            end_token_id=reasoner.config.loop.convergence.end_token_id,
        )
        survival = measured.survival
        values = {name: None if x is None else x.tolist() for name, x in vars(measured).items()}
        for i, path in enumerate(paths):
            path.append({name: None if x is None else finite_or_none(x[i]) for name, x in values.items()})
    return paths


def _forced(t: int) -> dict[str, Any]:
    return {"criterion": "fixed", "max_iterations": t, "min_iterations": t}


def _exit(path: list[Distance], rule: ExitRule) -> tuple[int, int]:
    """The last iteration that a loop with these distances runs, and the iteration whose state it keeps."""
    for t, measured in enumerate(path, start=1):
        norm = measured["norm"]
        reason = rule.update(
            t,
            distance=measured.get(rule.settings.criterion),
            change=measured["change"],
            norm=0.0 if norm is None else norm,
            finite=norm is not None,
        )
        if reason is not None:
            return t, rule.last_good_iteration(t, norm is not None) if reason == "diverged" else t
    raise AssertionError("an exit rule stops at the last iteration at the latest")


def _settled(texts: Sequence[str]) -> int:
    """The first index from which all texts equal the last one."""
    first = len(texts) - 1
    while first > 0 and texts[first - 1] == texts[-1]:
        first -= 1
    return first


def _thresholds(criterion: Criterion, values: Sequence[float | None]) -> list[float]:
    """Thresholds of a criterion, spread over the quantiles of its measured values."""
    known = torch.tensor([value for value in values if value is not None])
    if len(known) == 0:
        return []
    if criterion == "argmax_stable":  # its values are 0 and 1: one threshold between them, and one above
        return [DEFAULT_THRESHOLDS[criterion], 1.5]
    # Just above a quantile: the distance itself is then below the threshold.
    quantiles = known.quantile(torch.linspace(0, 1, THRESHOLDS)) * (1 + 1e-6) + 1e-9
    thresholds = set(quantiles.tolist())
    if criterion == "end_token":  # nearly all values are 1, and so are their quantiles
        thresholds.add(DEFAULT_THRESHOLDS[criterion])
    return sorted(thresholds)
