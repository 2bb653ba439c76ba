"""Probes: small classifiers on latent states, compared with shuffled labels and with chance.

A probe shows that a state contains something, not that the model uses it (Hewitt and Liang, 2019, arXiv 1909.03368;
Belinkov, 2022, arXiv 2102.12452). Every score therefore comes with the score of the same probe trained on labels that
are shuffled over the questions, and with the score of a guess without any state.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slr_core._install import missing_extra
from slr_core.errors import ConfigError
from slr_core.evaluation.labels import Label, Value
from slr_core.evaluation.statistics import wilson_interval
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example, Task
from slr_core.types import IterationRecord, Result

Probe = Literal["linear", "mlp"]
PROBES: tuple[Probe, ...] = get_args(Probe)
READOUT, MEAN = "readout", "mean"
"""Places: the position from which the next token is read, and the mean over the workspace."""
_TEST_SHARE = 0.3  # of the questions, held out
MIN_QUESTIONS = 10
"""Minimum number of training questions, and of test questions, for a score."""

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


# -- states -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectedStates:
    """The states of a set of questions, each with a loop of the same number of iterations.

    Attributes:
        iterations: number of iterations of each loop.
        states: per place ``[N, iterations + 1, d]`` fp32 on the CPU, h_0 first; NaN where there is no state: for h_0 if
            it is an input, and after the end of a loop that the divergence guard ended.
        tokens: ``[N]``, the first token of each answer.
        texts: the answers.
        right: whether the task accepts each answer.
        records: the iteration records of each question.
    """

    iterations: int
    states: Mapping[str, Tensor]
    tokens: Tensor
    texts: tuple[str, ...]
    right: tuple[bool, ...]
    records: tuple[tuple[IterationRecord, ...], ...]

    def usable(self, place: str, t: int) -> Tensor:
        """``[N]`` bool: the questions with a state at iteration ``t``."""
        return self.states[place][:, t].isfinite().all(-1)


def collect_states(
    reasoner: LatentReasoner,
    task: Task,
    examples: Sequence[Example],
    *,
    iterations: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> CollectedStates:
    """Answer every question after a loop of exactly ``iterations``, and keep the states.

    Args:
        reasoner: the model, in eval mode.
        task: puts the questions and grades the answers.
        examples: at least one question.
        iterations: number of iterations; by default the checkpoint's maximum.
        batch_size: number of questions per batch; affects speed only.
        progress: called with the number of further questions that are done.

    Raises:
        ConfigError: ``iterations`` is below 1.
        RequestError: a question does not fit the model.
    """
    iterations = reasoner.config.loop.max_iterations if iterations is None else iterations
    if iterations < 1:
        raise ConfigError(f"analysing a loop needs at least 1 iteration, got {iterations}")
    loop = LoopParams(criterion="fixed", min_iterations=iterations, max_iterations=iterations)
    places = (READOUT,) if reasoner.config.loop.workspace == "append" else (READOUT, MEAN)
    states: dict[str, list[Tensor]] = {place: [] for place in places}
    results: list[Result] = []
    for start in range(0, len(examples), batch_size):
        prompts = [task.prompt(example) for example in examples[start : start + batch_size]]
        requests = [prepare(reasoner, prompt, loop, trace=True, include_states=True) for prompt in prompts]
        for result in generate(reasoner, requests):
            assert result.states is not None
            for place in places:
                states[place].append(_at(result.states, place, iterations, reasoner.is_state(0)))
            results.append(result)
        progress(len(prompts))
    return CollectedStates(
        iterations=iterations,
        states={place: torch.stack(rows) for place, rows in states.items()},
        tokens=torch.tensor([result.token_ids[0] for result in results]),
        texts=tuple(result.text for result in results),
        right=tuple(task.grade(e, result.text) for e, result in zip(examples, results, strict=True)),
        records=tuple(result.records for result in results),
    )


def _at(states: Tensor, place: str, iterations: int, starts_from_state: bool) -> Tensor:
    """The states of one question at a place, ``[iterations + 1, d]``, from those of its loop, ``[t + 1, W, d]``."""
    reduced = states[:, -1] if place == READOUT else states.mean(1)
    full = torch.full((iterations + 1, reduced.shape[-1]), torch.nan)
    first = 0 if starts_from_state else 1
    full[first : len(reduced)] = reduced[first:]
    return full


# -- probes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScore:
    """The score of one probe at one iteration, on held-out questions.

    Attributes:
        label: name of the label.
        place: place of the state, see :data:`READOUT`.
        probe: kind of the probe.
        t: the iteration.
        metric: ``accuracy`` for classes; ``ranking precision`` for sets: with the classes ranked by predicted
            probability, the share of right ones among those ranked no lower than a right one, averaged over the right
            ones and then over the questions.
        score: on the held-out questions.
        interval: 95 % interval of the score.
        shuffled: mean score of the same probe trained on shuffled labels.
        chance: score of always predicting the most frequent class, or of ranking the classes by frequency.
        trained_on: number of training questions.
        tested_on: number of test questions.
    """

    label: str
    place: str
    probe: str
    t: int
    metric: str
    score: float
    interval: tuple[float, float]
    shuffled: float
    chance: float
    trained_on: int
    tested_on: int


def train_probes(
    collected: CollectedStates,
    examples: Sequence[Example],
    labels: Sequence[Label],
    *,
    probes: Sequence[Probe] = PROBES,
    seed: int = 0,
    shuffles: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> list[ProbeScore]:
    """Train and test every probe for every label, place and iteration.

    The split is by question and always the same: no probe is tested on a question that it, or the probe of another
    iteration, was trained on. There is no score if fewer than :data:`MIN_QUESTIONS` questions have the label, or if it
    is the same for all.

    Args:
        collected: the states.
        examples: the questions of the states, in order.
        labels: the labels to predict.
        probes: the kinds of probes.
        seed: seed of the split, the shuffled labels and the weights of the probes.
        shuffles: number of trainings on shuffled labels; at least 1.
        progress: called once per label, place and iteration.

    Raises:
        ConfigError: scikit-learn is not installed, or an argument is out of range.
    """
    if shuffles < 1:
        raise ConfigError(f"shuffles must be at least 1, got {shuffles}")
    _require_sklearn()
    held_out = _held_out(examples, seed)
    scores = []
    for label, place, t in probe_places(collected, labels):
        values = [label.of(example, t) for example in examples]
        has = collected.usable(place, t).numpy() & np.array([bool(value) for value in values])
        train, test = np.flatnonzero(has & ~held_out), np.flatnonzero(has & held_out)
        if min(len(train), len(test)) >= MIN_QUESTIONS:
            x = collected.states[place][:, t].double().numpy()
            target = _target([values[i] or "" for i in train], [values[i] or "" for i in test])
            if target.varies:
                for kind in probes:
                    figures = _score(_Trainer(kind, x[train], x[test], seed), target, seed, shuffles)
                    scores.append(ProbeScore(label.name, place, kind, t, **figures))
        progress()
    return scores


def probe_places(collected: CollectedStates, labels: Sequence[Label]) -> list[tuple[Label, str, int]]:
    """All combinations of label, place and iteration, in the order of the scores."""
    iterations = range(collected.iterations + 1)
    return [(label, place, t) for label in labels for place in collected.states for t in iterations]


def _held_out(examples: Sequence[Example], seed: int) -> NDArray[np.bool_]:
    # Equal questions are on the same side of the split.
    texts = sorted({example.question for example in examples})
    order = np.random.default_rng(seed).permutation(len(texts))
    chosen = {texts[i] for i in order[: round(_TEST_SHARE * len(texts))]}
    return np.array([example.question in chosen for example in examples])


class _Target:
    """The values of a label as arrays, and the scores of predictions of it."""

    metric: str
    train: NDArray[Any]
    varies: bool

    def scores(self, trainer: _Trainer, train: NDArray[Any]) -> Floats:
        """The score per test question, ``[m]``, of a probe trained on the targets ``train``."""
        raise NotImplementedError

    def chance(self) -> float:
        """The mean score of a guess without any state."""
        raise NotImplementedError

    def interval(self, scores: Floats) -> tuple[float, float]:
        """95 % interval of the mean score."""
        raise NotImplementedError


class _Classes(_Target):
    metric = "accuracy"

    def __init__(self, train: Sequence[Value], test: Sequence[Value]) -> None:
        self.train, self.test = np.array(train), np.array(test)
        self.varies = len(set(train)) > 1

    def scores(self, trainer: _Trainer, train: NDArray[Any]) -> Floats:
        return np.asarray(trainer.predict(train) == self.test, dtype=np.float64)

    def chance(self) -> float:
        counts = Counter(self.train.tolist())
        # Ties in alphabetical order.
        commonest = min(counts, key=lambda value: (-counts[value], value))
        return float((self.test == commonest).mean())

    def interval(self, scores: Floats) -> tuple[float, float]:
        return wilson_interval(int(scores.sum()), len(scores))


class _Sets(_Target):
    metric = "ranking precision"

    def __init__(self, train: Sequence[Value], test: Sequence[Value]) -> None:
        names = sorted({name for value in (*train, *test) for name in value})
        self.train, self.test = _matrix(train, names), _matrix(test, names)
        self.varies = bool(_varying(self.train).any())

    def scores(self, trainer: _Trainer, train: NDArray[Any]) -> Floats:
        # A column that is constant in training keeps its training frequency.
        likely = np.tile(train.mean(0), (len(self.test), 1))
        varying = _varying(train)
        likely[:, varying] = trainer.likely(train[:, varying])
        return ranking_precision(likely, self.test)

    def chance(self) -> float:
        return float(ranking_precision(np.tile(self.train.mean(0), (len(self.test), 1)), self.test).mean())

    def interval(self, scores: Floats) -> tuple[float, float]:
        mean, half = float(scores.mean()), 1.96 * float(scores.std(ddof=1)) / sqrt(len(scores))
        return max(0.0, mean - half), min(1.0, mean + half)


def _varying(train: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((train != train[0]).any(0))


def _target(train: Sequence[Value], test: Sequence[Value]) -> _Target:
    return _Classes(train, test) if isinstance(train[0], str) else _Sets(train, test)


def _matrix(values: Sequence[Iterable[str]], names: Sequence[str]) -> NDArray[np.int64]:
    return np.array([[name in value for name in names] for value in values], dtype=np.int64)


def ranking_precision(likely: Floats, truth: NDArray[Any]) -> Floats:
    """Label ranking average precision of each row (Tsoumakas et al., 2010); ties count as ranked lower.

    Args:
        likely: ``[n, k]``, scores of the classes.
        truth: ``[n, k]``, non-zero where a class applies; at least one per row.
    """
    applies = truth.astype(bool)
    no_lower = likely[:, None, :] >= likely[:, :, None]  # [n, class, those ranked no lower]
    precision = (no_lower & applies[:, None, :]).sum(-1) / no_lower.sum(-1)
    return np.asarray((precision * applies).sum(-1) / applies.sum(-1), dtype=np.float64)


class _Trainer:
    """Trains probes of one kind on the same states, standardized over the training set."""

    def __init__(self, kind: Probe, x: Floats, x_test: Floats, seed: int) -> None:
        from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

        scaler = StandardScaler().fit(x)
        self.kind, self.seed = kind, seed
        self.x, self.x_test = scaler.transform(x), scaler.transform(x_test)

    def predict(self, y: NDArray[Any]) -> NDArray[Any]:
        """The predicted class of each test question, ``[m]``."""
        return np.asarray(self._fitted(y).predict(self.x_test))

    def likely(self, y: NDArray[Any]) -> Floats:
        """The probability of each class for each test question, ``[m, k]``."""
        if self.kind == "mlp" and y.shape[1] > 1:
            return np.asarray(self._fitted(y).predict_proba(self.x_test))
        columns = [self._fitted(column).predict_proba(self.x_test)[:, 1] for column in y.T]
        return np.stack(columns, axis=1)

    def _fitted(self, y: NDArray[Any]) -> Any:
        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
        from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        if self.kind == "linear":
            model = LogisticRegression(C=0.1, max_iter=300)
        else:
            model = MLPClassifier((64,), solver="lbfgs", alpha=1.0, max_iter=200, random_state=self.seed)
        # Many small problems: one thread is fastest.
        with warnings.catch_warnings(), threadpool_limits(1):
            # On shuffled labels, training need not converge.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(self.x, y)


def _score(trainer: _Trainer, target: _Target, seed: int, shuffles: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scores = target.scores(trainer, target.train)
    shuffled = [target.scores(trainer, rng.permutation(target.train)).mean() for _ in range(shuffles)]
    return {
        "metric": target.metric,
        "score": float(scores.mean()),
        "interval": target.interval(scores),
        "shuffled": float(np.mean(shuffled)),
        "chance": target.chance(),
        "trained_on": len(trainer.x),
        "tested_on": len(trainer.x_test),
    }


def _require_sklearn() -> None:
    try:
        import sklearn  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise missing_extra("probing", "eval", error) from error
