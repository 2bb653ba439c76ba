"""Probes find what was planted, and nothing else."""

import builtins
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from slr_core import tasks
from slr_core.errors import ConfigError
from slr_core.evaluation.labels import LABELS, Label
from slr_core.evaluation.probes import (
    MEAN,
    READOUT,
    CollectedStates,
    collect_states,
    probe_places,
    ranking_precision,
    train_probes,
)
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import frontiers
from tests import tiny
from tests.tiny import WORKSPACES, reasoner

COLOURS = 4
QUESTIONS = 120
CLASS = Label("class", "which of four", lambda e, t: str(e.extra["class"]))
PAIR = Label("pair", "the class and the next", lambda e, t: _pair(e.extra["class"]))


def _pair(number: int) -> frozenset[str]:
    return frozenset((str(number), str((number + 1) % COLOURS)))


def questions(count: int = QUESTIONS) -> list[Example]:
    """Random words whose class is drawn apart from them: no state can know it, unless somebody plants it."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        text = tiny.words(*(int(i) for i in rng.integers(0, 37, 6)))
        made.append(Example(text, ("one step",), "w1", {"class": int(rng.integers(COLOURS))}))
    return made


class Anything(tasks.Task):
    """Asks and accepts whatever it is given."""

    name = "anything"

    def extract(self, text: str) -> str | None:
        return text or None

    def grade(self, example: Example, text: str) -> bool:
        return True


@contextmanager
def planted(made: LatentReasoner, examples: list[Example], batch_size: int) -> Iterator[None]:
    """From iteration 2 on every state of a question carries a one-hot of its class."""
    classes = torch.tensor([example.extra["class"] for example in examples])
    calls = 0

    def plant(_module: Any, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        batch, t = divmod(calls, made.config.loop.max_iterations)
        calls += 1
        if t == 0:
            return hidden
        own = classes[batch * batch_size : (batch + 1) * batch_size]
        carried = hidden.clone()
        carried[..., :COLOURS] = 5 * torch.nn.functional.one_hot(own, COLOURS)[:, None].to(hidden)
        return carried

    handle = made.residual.register_forward_hook(plant)
    try:
        yield
    finally:
        handle.remove()


def states(fill: Callable[[int, int], torch.Tensor], examples: list[Example], iterations: int = 1) -> CollectedStates:
    """Collected states that need no model: ``fill(question, t)``."""
    made = torch.stack([torch.stack([fill(i, t) for t in range(iterations + 1)]) for i in range(len(examples))])
    count = len(examples)
    return CollectedStates(
        iterations, {READOUT: made}, torch.zeros(count, dtype=torch.long), ("",) * count, (True,) * count, ((),) * count
    )


def noise(width: int = 8) -> Callable[[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda i, t: torch.randn(width, generator=generator)


@pytest.mark.slow
def test_probe_finds_planted_label():
    made, examples = reasoner(loop={"max_iterations": 3}, text={"max_new_tokens": 1}), questions()
    with planted(made, examples, 50):
        collected = collect_states(made, Anything(), examples, batch_size=50)
    scores = train_probes(collected, examples, [CLASS, PAIR])
    for label, kind in ((name, kind) for name in ("class", "pair") for kind in ("linear", "mlp")):
        by_t = {s.t: s for s in scores if (s.label, s.probe) == (label, kind)}
        assert sorted(by_t) == [0, 1, 2, 3]
        for t in (2, 3):
            assert by_t[t].score > 0.97
            assert by_t[t].interval[0] > 0.85
        for t in (0, 1):  # before the planting
            assert by_t[t].score < by_t[t].chance + 0.2
        for s in by_t.values():
            assert abs(s.shuffled - s.chance) < 0.2
            assert s.trained_on + s.tested_on == QUESTIONS


@pytest.mark.slow
def test_noise_scores_like_chance():
    examples = questions(400)
    for s in train_probes(states(noise(), examples), examples, [CLASS, PAIR]):
        assert s.interval[0] <= s.chance + 0.08
        assert abs(s.score - s.shuffled) < 0.15


def test_duplicate_questions():
    # States and classes of their own for 30 texts: a split by state would let a probe learn them by heart.
    texts = questions(30)
    examples = texts * 8
    own = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    collected = states(lambda i, t: own[i % 30], examples)
    for s in train_probes(collected, examples, [CLASS], probes=["linear"], seed=1):
        assert s.tested_on % 8 == 0
        assert s.score < 0.7


def test_chance_is_the_commonest_class_of_the_training_questions():
    examples = [Example(f"w{i}", (), "", {"class": int(i % 4 == 0)}) for i in range(400)]
    (first, *_) = train_probes(states(noise(2), examples), examples, [CLASS], probes=["linear"])
    assert first.chance == pytest.approx(0.75, abs=0.08)
    assert first.metric == "accuracy"


@pytest.mark.slow
def test_seed_sets_the_split():
    examples = questions()
    collected = states(noise(), examples)
    assert train_probes(collected, examples, [CLASS], seed=3) == train_probes(collected, examples, [CLASS], seed=3)
    assert train_probes(collected, examples, [CLASS], seed=3) != train_probes(collected, examples, [CLASS], seed=4)


def test_questions_without_a_label_or_a_state_are_left_out():
    examples = questions()
    collected = states(noise(), examples)
    collected.states[READOUT][:40, 1] = torch.nan
    half = Label(
        "half", "of every second question", lambda e, t: str(e.extra["class"]) if e.extra["class"] < 2 else None
    )
    labelled = [e.extra["class"] < 2 for e in examples]
    at_0, at_1 = train_probes(collected, examples, [half], probes=["linear"])
    assert at_0.trained_on + at_0.tested_on == sum(labelled)
    assert at_1.trained_on + at_1.tested_on == sum(labelled[40:])


def test_where_all_labels_are_alike_or_too_few_there_is_no_score():
    examples = questions()
    collected = states(noise(), examples)
    same = Label("same", "always", lambda e, t: "x")
    every = Label("every", "always both", lambda e, t: frozenset("xy"))
    empty = Label("empty", "never", lambda e, t: frozenset())
    assert train_probes(collected, examples, [same, every, empty]) == []
    few = examples[:20]
    assert train_probes(states(noise(), few), few, [CLASS]) == []


def test_unseen_class_ranks_last():
    # Every tenth question has a class of its own, and nothing else: held out, it cannot be found.
    examples = questions(60)
    numbers = {example.question: i for i, example in enumerate(examples)}

    def own(example: Example, _t: int) -> frozenset[str]:
        number = numbers[example.question]
        return frozenset((f"own {number}",) if number % 10 == 0 else ("common",))

    (first, *_) = train_probes(states(noise(), examples), examples, [Label("own", "", own)], probes=["linear"])
    assert 1 / 14 < first.score < 1  # the common ones are found; of those with classes of their own, none
    assert first.chance == pytest.approx(first.score, abs=0.05)


def test_ranking_precision_by_hand():
    likely = np.array([[0.9, 0.8, 0.1, 0.2], [0.9, 0.8, 0.1, 0.2], [0.5, 0.5, 0.5, 0.5]])
    truth = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    # Row 2: ranks 2 and 3, of which 1 and 2 are right. Row 3: a tie of four ranks fourth.
    np.testing.assert_allclose(ranking_precision(likely, truth), [1.0, (1 / 2 + 2 / 3) / 2, 1 / 4])


def test_no_shuffles():
    examples = questions(30)
    with pytest.raises(ConfigError, match="must be"):
        train_probes(states(noise(), examples), examples, [CLASS], shuffles=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    examples = questions(30)
    with pytest.raises(ConfigError, match="extra `eval`"):
        train_probes(states(noise(), examples), examples, [CLASS])


# -- collecting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_states_are_those_of_the_loop_forced_to_its_end(workspace):
    made, examples = reasoner(loop=WORKSPACES[workspace]), questions(5)
    collected = collect_states(made, Anything(), examples, iterations=4, batch_size=2)
    assert set(collected.states) == ({READOUT} if workspace == "append" else {READOUT, MEAN})
    for i, example in enumerate(examples):
        with torch.inference_mode():
            unrolled = made.unroll(made.encode(*tiny.batch([example.question])), 4)[0]
        first = 0 if workspace == "append" else 1
        torch.testing.assert_close(collected.states[READOUT][i, first:], unrolled[first:, -1], atol=1e-4, rtol=1e-4)
        if workspace != "append":
            torch.testing.assert_close(collected.states[MEAN][i, 1:], unrolled[1:].mean(1), atol=1e-4, rtol=1e-4)
            assert collected.states[READOUT][i, 0].isnan().all()  # an input, and no state
    assert collected.usable(READOUT, 0).all() == (workspace == "append")
    assert collected.usable(READOUT, 4).all()
    assert [len(records) for records in collected.records] == [4] * 5
    assert len(collected.tokens) == len(collected.texts) == len(collected.right) == 5


def test_a_loop_that_the_guard_ends_has_no_states_after_it():
    made, examples = reasoner(), questions(6)

    def burst(_module: Any, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        spoilt = hidden.clone()
        spoilt[0] = torch.nan
        return spoilt

    handle = made.residual.register_forward_hook(burst)
    collected = collect_states(made, Anything(), examples, batch_size=6)
    handle.remove()
    assert collected.usable(READOUT, 0).all()
    for t in (1, made.config.loop.max_iterations):
        assert collected.usable(READOUT, t).tolist() == [False] + [True] * 5


def test_a_loop_of_no_iterations_is_refused():
    with pytest.raises(ConfigError, match="at least 1 iteration"):
        collect_states(reasoner(), Anything(), questions(1), iterations=0)


def test_progress_counts_every_question_and_every_place_to_look():
    made, examples = reasoner(loop=WORKSPACES["block"] | {"max_iterations": 2}), questions(7)
    done: list[int] = []
    collected = collect_states(made, Anything(), examples, batch_size=3, progress=done.append)
    assert done == [3, 3, 1]
    looked: list[None] = []
    train_probes(collected, examples, [CLASS], progress=lambda: looked.append(None))
    assert len(looked) == len(probe_places(collected, [CLASS])) == 6


# -- labels -----------------------------------------------------------------------------------------------


def drawn(task: str, count: int = 30, **options: Any) -> list[Example]:
    return list(islice(tasks.get_task(task).generate(0, **options), count))


def value(task: str, name: str, example: Example, t: int) -> Any:
    (label,) = (label for label in LABELS[task] if label.name == name)
    return label.of(example, t)


def test_prosqa_frontiers():
    for example in drawn("prosqa"):
        levels = frontiers(example)
        assert value("prosqa", "frontier", example, 0) is None
        assert value("prosqa", "frontier", example, len(levels)) is None
        for t in range(1, len(levels)):
            assert value("prosqa", "frontier", example, t) == set(levels[t])


def test_prosqa_distance_counts_down_to_nothing():
    for example in drawn("prosqa"):
        hops = len(example.steps)
        left = [value("prosqa", "distance", example, t) for t in range(hops + 2)]
        assert left == [str(n) for n in (*range(hops, -1, -1), 0)]


def test_prosqa_option():
    seen = set()
    for example in drawn("prosqa"):
        right = example.answer.removesuffix(".").rpartition(" ")[2]
        first = example.question.rpartition(" Is ")[2].split(" or ")[0].endswith(f" {right}")
        assert value("prosqa", "option", example, 3) == ("first" if first else "second")
        assert value("prosqa", "target", example, 3) == {right}
        seen.add(first)
    assert seen == {True, False}


def test_arithmetic_labels():
    for example in drawn("arithmetic", digits=4):
        digits = [value("arithmetic", "digit", example, t) for t in range(1, 5)]
        carries = [value("arithmetic", "carry", example, t) for t in range(1, 5)]
        overflow = "1" if carries[-1] == "1" else ""
        assert overflow + "".join(reversed(digits)) == example.answer
        assert value("arithmetic", "digit", example, 0) is value("arithmetic", "digit", example, 5) is None
    (product,) = drawn("arithmetic", 1, operation="multiply")
    assert value("arithmetic", "digit", product, 1) is value("arithmetic", "carry", product, 1) is None


def test_modular_arithmetic_residues_end_in_the_answer():
    (example,) = drawn("modular_arithmetic", 1, length=3)
    residues = [value("modular_arithmetic", "residue", example, t) for t in range(5)]
    assert residues[3] == example.answer
    assert residues[0] is residues[4] is None
    assert all(step.endswith(f"= {residue}") for step, residue in zip(example.steps, residues[1:], strict=False))


def test_state_tracking_rows_say_which_element_lies_where():
    (example,) = drawn("state_tracking", 1, length=3)
    expected = {f"{place}: {element}" for place, element in enumerate(example.answer.split(), start=1)}
    assert value("state_tracking", "row", example, 3) == expected
    assert not value("state_tracking", "row", example, 0)
    assert not value("state_tracking", "row", example, 4)


def test_reachability_frontiers_are_those_of_the_steps():
    (example,) = drawn("reachability", 1)
    assert value("reachability", "frontier", example, 1) == {
        str(b) for a, b in example.extra["links"] if a == example.extra["source"] and b != a
    }
    assert not value("reachability", "frontier", example, 0)


def test_every_label_is_of_a_task_that_exists():
    assert LABELS.keys() <= tasks.TASKS.keys()
