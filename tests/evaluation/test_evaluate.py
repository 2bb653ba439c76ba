from itertools import islice
from statistics import fmean

import pytest

from slr_core.evaluation.evaluate import evaluate, summarize, wilson
from slr_core.generation import generate, prepare
from slr_core.loop.convergence import LoopSettings
from slr_core.tasks.prosqa import GraphSpec, ProsQA
from slr_core.tasks.prosqa import generate as make
from slr_core.training.trainer import build
from tests import tiny
from tests.training.recipe import recipe


@pytest.fixture(scope="module")
def reasoner():
    made = build(recipe())
    tiny.shake(made)
    return made.eval()


@pytest.fixture(scope="module")
def examples():
    return list(islice(make(GraphSpec(8, 1, 3, balanced=False), 0), 12))


@pytest.fixture(scope="module")
def settings(reasoner):
    return LoopSettings.resolve(reasoner.config.loop, max_iterations=4, threshold=0.5)


def lucky(example, text):
    return sum(map(ord, example.question + text)) % 2 == 0


class Generous(ProsQA):
    """Grades by chance, so that a model that knows nothing gets some right."""

    def grade(self, example, text):
        return lucky(example, text)


# -- the interval ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (475, 500, 0.927, 0.966), (1, 1, 0.207, 1.0)],
)
def test_wilson_intervals_of_the_tables(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("trials", [1, 3, 50])
def test_the_interval_holds_the_share(trials):
    for successes in range(trials + 1):
        low, high = wilson(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


# -- evaluating ------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results(reasoner, examples, settings):
    report = evaluate(reasoner, Generous(), examples, settings=settings)
    results = [generate(reasoner, [prepare(reasoner, e.question, settings)])[0] for e in examples]
    right = [lucky(e, result.text) for e, result in zip(examples, results, strict=True)]
    assert 0 < sum(right) < len(right)
    overall = report.overall
    assert overall.questions == 12
    assert overall.accuracy == fmean(right)
    assert overall.interval == wilson(sum(right), 12)
    assert overall.iterations == fmean(result.iterations for result in results)
    assert overall.forward_passes == fmean(result.forward_passes for result in results)
    assert overall.converged == fmean(result.exit_reason == "converged" for result in results)
    assert overall.diverged == 0
    first = fmean(result.records[0].relative_change for result in results)
    assert overall.relative_change[0] == pytest.approx(first, rel=1e-4)
    assert len(overall.relative_change) == max(result.iterations for result in results)

    assert list(report.by_difficulty) == sorted({len(e.steps) for e in examples})
    for level, summary in report.by_difficulty.items():
        chosen = [ok for ok, e in zip(right, examples, strict=True) if len(e.steps) == level]
        assert (summary.questions, summary.accuracy) == (len(chosen), fmean(chosen))
    rule = fmean(ProsQA().baselines(e)["depth_rule"] for e in examples)
    assert report.baselines == {"depth_rule": rule}
    assert report.to_json()["overall"]["accuracy"] == overall.accuracy


def test_the_batch_size_changes_no_answer_and_progress_is_told(reasoner, examples, settings):
    told = []
    whole = evaluate(reasoner, Generous(), examples, settings=settings)
    parts = evaluate(reasoner, Generous(), examples, settings=settings, batch_size=5, progress=told.append)
    assert told == [5, 5, 2]
    for name in ("accuracy", "iterations", "converged", "forward_passes"):
        assert getattr(parts.overall, name) == getattr(whole.overall, name)


def test_without_iterations_there_are_no_changes(reasoner, examples):
    none = LoopSettings.resolve(reasoner.config.loop, max_iterations=0)
    overall = evaluate(reasoner, ProsQA(), examples[:3], settings=none).overall
    assert (overall.iterations, overall.relative_change, overall.converged) == (0, (), 0)


def test_changes_are_averaged_over_those_that_got_there(reasoner, examples):
    results = [
        generate(
            reasoner,
            [
                prepare(
                    reasoner, e.question, LoopSettings.resolve(reasoner.config.loop, max_iterations=n, threshold=0.0)
                )
            ],
        )[0]
        for n, e in zip((1, 3), examples, strict=False)
    ]
    changes = summarize([(result, True) for result in results]).relative_change
    both = [result.records[0].relative_change for result in results]
    assert changes == pytest.approx((fmean(both), *(r.relative_change for r in results[1].records[1:])))
