"""A loop forced, disturbed and stopped: what a study says against the loop itself."""

import json
from itertools import pairwise
from statistics import fmean
from typing import get_args

import pytest
import torch

from slr_core.config import Criterion, GuardConfig
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, NOISY_START, MethodSettings
from slr_core.evaluation.run import run_method
from slr_core.evaluation.stability import (
    NOISES,
    ExitPoint,
    StabilityReport,
    StabilityStudy,
    _exit,
    _settled,
    best_exits,
    measure_distances,
)
from slr_core.evaluation.statistics import summarize
from slr_core.evaluation.store import Store
from slr_core.generation.reference import generate
from slr_core.loop.convergence import ExitRule
from slr_core.model.exits import loop_until_exit
from slr_core.params import LoopParams, ResolvedLoopParams
from tests import tiny
from tests.evaluation.asked import Words, questions

ASKED = questions(9)
MODEL = {"name": "tiny", "sha256": "0" * 64}


def model(workspace="append", **loop):
    changes = {"trained_iterations": 2, "max_iterations": 4, "convergence": {"threshold": 0.4}, **loop}
    return tiny.reasoner(loop={**tiny.WORKSPACES[workspace], **changes}, text={"max_new_tokens": 3})


@pytest.fixture(scope="module")
def local():
    return Local(model())


def study(local, store=None, **options):
    return StabilityStudy(local, Words(), ASKED, MODEL, store or Store(), **options)


@pytest.fixture(scope="module")
def found(local):
    return study(local).run(past=3)


def answers(local, method, loop=None, **settings):
    return run_method(method, local, Words(), ASKED.examples, MethodSettings(loop or {}, **settings))


def timeless(summary):
    """What must not change from run to run: the engine computes a question beside whoever is there, which rounds."""
    rounded = {
        "contraction_rate": summary.contraction_rate and round(summary.contraction_rate, 4),
        "relative_change": [x and round(x, 4) for x in summary.relative_change],
    }
    return {name: value for name, value in vars(summary).items() if name != "seconds"} | rounded


# -- a whole study ---------------------------------------------------------------------------------------


def test_forced_depths_are_those_of_separate_runs(local, found):
    assert list(found.by_depth) == list(range(3 * 2 + 1))
    for t, summary in found.by_depth.items():
        loop = {"criterion": "fixed", "max_iterations": t, "min_iterations": t}
        assert timeless(summary) == timeless(summarize(answers(local, METHODS["slr"], loop)))
        assert summary.iterations == t
    assert len({summary.accuracy for summary in found.by_depth.values()}) > 1


def test_the_default_and_the_noise_are_those_of_separate_runs(local, found):
    default = answers(local, METHODS["slr"])
    assert timeless(found.default) == timeless(summarize(default))
    assert 1 < found.default.iterations < 4
    assert tuple(found.noise) == NOISES
    for scale, (summary, changed) in found.noise.items():
        noisy = answers(local, NOISY_START, noise=scale)
        assert timeless(summary) == timeless(summarize(noisy))
        assert changed == fmean(a.text != b.text for a, b in zip(noisy, default, strict=True))
    assert found.noise[1.0][1] > found.noise[0.01][1]


def test_excess(local, found):
    texts = [
        [o.text for o in answers(local, METHODS["slr_fixed"], {"max_iterations": t, "min_iterations": t})]
        for t in range(5)
    ]
    needed = []
    for own in zip(*texts, strict=True):
        last_change = max((t for t in range(1, 5) if own[t] != own[t - 1]), default=0)
        needed.append(last_change)
    ran = [o.iterations for o in answers(local, METHODS["slr"])]
    assert len(set(needed)) > 1
    assert found.excess == pytest.approx(fmean(t - first for t, first in zip(ran, needed, strict=True)))


def test_exits_cover_every_criterion_over_its_thresholds(found):
    criteria = {exit.criterion for exit in found.exits}
    assert criteria == {"relative_change", "cosine", "kl", "entropy_change", "argmax_stable"}
    for criterion in criteria:
        own = [exit for exit in found.exits if exit.criterion == criterion]
        assert [exit.threshold for exit in own] == sorted({exit.threshold for exit in own})
        # A higher threshold never stops later.
        assert [exit.iterations for exit in own] == sorted((exit.iterations for exit in own), reverse=True)
        assert own[-1].iterations == 1.0
        assert criterion != "argmax_stable" or [exit.threshold for exit in own] == [0.5, 1.5]
        assert all(0 <= exit.accuracy <= 1 and 1 <= exit.iterations <= 4 for exit in own)
    assert max(exit.iterations for exit in found.exits) > 3.5


def test_an_exit_scores_as_a_loop_with_its_settings(local, found):
    for criterion in ("relative_change", "kl"):
        own = [exit for exit in found.exits if exit.criterion == criterion]
        # Between two thresholds of the grid no question is near the threshold.
        for low, high in list(pairwise(own))[::3]:
            middle = (low.threshold + high.threshold) / 2
            loop = {"criterion": criterion, "threshold": middle, "patience": 1, "min_iterations": 1}
            summary = summarize(answers(local, METHODS["slr"], loop))
            assert high.iterations <= summary.iterations <= low.iterations
        last = own[-1]
        loop = {"criterion": criterion, "threshold": last.threshold * 1.01, "patience": 1, "min_iterations": 1}
        summary = summarize(answers(local, METHODS["slr"], loop))
        assert (summary.iterations, summary.accuracy) == (last.iterations, last.accuracy)


@pytest.mark.parametrize("workspace", ["block", "prompt"])
def test_a_study_of_the_other_workspaces(workspace):
    made = Local(model(workspace, halting_head=True, convergence={"end_token_id": 7}))
    found = study(made).run(past=2)
    assert {exit.criterion for exit in found.exits} == set(get_args(Criterion)) - {"fixed"}
    compared = [exit.iterations for exit in found.exits if exit.criterion not in ("end_token", "survival")]
    assert min(compared) == 2.0, "at t = 1 nothing compares"
    assert found.by_depth[4].iterations == 4


def test_a_study_goes_on_where_it_was_and_shares_its_runs(local, found, tmp_path):
    path = tmp_path / "results.jsonl"
    told = {}

    def progress(name, count):
        told[name] = told.get(name, 0) + count
        if name == "noise 0.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(local, Store(path), progress=progress, batch_size=4).run(past=3)
    assert set(told) == {*(f"depth {t}" for t in range(7)), "as configured", "noise 0.01", "noise 0.03", "noise 0.1"}
    before = path.read_text().splitlines()
    again = study(local, Store(path), batch_size=4).run(past=3)
    after = path.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == (7 + 1 + len(NOISES)) * (1 + 9)
    for t, summary in found.by_depth.items():
        assert summary.accuracy == again.by_depth[t].accuracy
    assert (again.excess, again.correlation) == (found.excess, found.correlation)
    told.clear()
    study(local, Store(path), progress=lambda name, count: told.update({name: told.get(name, 0) + count})).run(past=3)
    assert set(told.values()) == {9}
    assert path.read_text().splitlines() == after


def test_a_study_goes_through_json(found):
    assert StabilityReport.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert StabilityReport.from_json(found.to_json()) == found


# -- exits without running -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workspace", tiny.WORKSPACES)
@pytest.mark.parametrize(
    "changes",
    [
        {"halting_head": True, "convergence": {"end_token_id": 7}},
        {"residual": {"source": "previous", "alpha": 0.3}},
        {"timestep": {"noise_level": True}},
    ],
    ids=["halting", "previous", "noise"],
)
def test_simulated_exits_are_the_loops_own(workspace, changes):
    made = model(workspace, max_iterations=6, trained_iterations=3, **changes)
    most, prompts = 6, [example.question for example in ASKED.examples]
    paths = measure_distances(made, prompts, most)
    exits, compared = set(), 0
    for criterion in get_args(Criterion):
        known = sorted(d[criterion] for path in paths for d in path if d.get(criterion) is not None)
        # Between neighbours, so that rounding decides nothing.
        thresholds = [(a + b) / 2 for a, b in pairwise(known)][:: max(1, len(known) // 3)] or [0.5]
        for threshold in thresholds:
            for patience, least in ((1, 1), (2, 3)):
                settings = ResolvedLoopParams(most, least, criterion, threshold, patience)
                loop = dict(vars(settings))
                if made.config.loop.missing_for(criterion):
                    continue
                results = generate(made, [tiny.request(made, prompt, loop, max_new_tokens=1) for prompt in prompts])
                for path, result in zip(paths, results, strict=True):
                    if any(abs((d.get(criterion) or 0.0) - threshold) < 1e-3 * threshold for d in path):
                        continue
                    compared += 1
                    exits.add(result.iterations)
                    assert _exit(path, ExitRule(settings, made.config.loop.guard)) == (
                        result.iterations,
                        result.iterations,
                    )
    assert compared > 150
    assert {2, 3, 4, 6} <= exits


def test_distances_are_those_of_a_traced_loop():
    made = model("block", max_iterations=5, halting_head=True)
    loop = {"criterion": "fixed", "max_iterations": 5}
    prompts = list(tiny.PROMPTS)
    for path, result in zip(
        measure_distances(made, prompts, 5),
        generate(made, [tiny.request(made, prompt, loop, trace=True) for prompt in prompts]),
        strict=True,
    ):
        for measured, record in zip(path, result.records, strict=True):
            for name in ("relative_change", "cosine", "norm", "kl", "entropy"):
                mine, its = measured[name], getattr(record, name)
                assert (mine is None) == (its is None)
                assert (mine or 0.0) == pytest.approx(its or 0.0, rel=1e-3, abs=1e-5)
    assert path[0]["learned"] is None
    assert 0 < path[1]["learned"] < 1


def test_prompts_are_put_as_requests_are():
    made = tiny.reasoner(text={"prompt_prefix": "w1 w2 ", "prompt_suffix": " w3"})
    plain = tiny.reasoner()
    (mine,), (its,) = measure_distances(made, ["w9 w8"], 3), measure_distances(plain, ["w1 w2 w9 w8 w3"], 3)
    assert mine == its


def test_diverging_loop_cost():
    growing = {"residual": {"source": "previous", "mix": "add", "scale": 3.0}}
    made = model(
        max_iterations=6, trained_iterations=3, guard={"expanding_iterations": 2, "norm_factor": 2.0}, **growing
    )
    prompts = list(tiny.PROMPTS)
    settings = LoopParams(criterion="fixed").resolve(made.config)
    context = made.encode(*tiny.batch(prompts))
    with torch.inference_mode():
        output = loop_until_exit(made, context, [settings] * len(prompts))
    exits = [_exit(path, ExitRule(settings, made.config.loop.guard)) for path in measure_distances(made, prompts, 6)]
    assert exits == list(zip(output.iterations, output.kept_iterations, strict=True))
    assert any(kept < ran < 6 for ran, kept in exits)


def measured(norm, change):
    return {"norm": norm, "change": change, "relative_change": change}


def test_nonfinite_loop_keeps_iteration_before():
    path = [measured(1.0, 0.5), measured(1.0, 0.4), measured(None, None), measured(None, None)]
    assert _exit(path, ExitRule(ResolvedLoopParams(4, 1, "fixed", 0.0, 1), GuardConfig())) == (3, 2)


@pytest.mark.parametrize(
    ("texts", "first"),
    [("aaaa", 0), ("abbb", 1), ("aaab", 3), ("abab", 3), ("abaa", 2), ("a", 0), ("ab", 1), ("baab", 3)],
)
def test_an_answer_is_settled_from_its_last_change_on(texts, first):
    assert _settled(list(texts)) == first


def test_best_exits():
    figures = {"kl": [(3, 0.5), (1, 0.2), (2, 0.6), (4, 0.7), (2, 0.1)], "cosine": [(2, 0.3), (1, 0.3)]}
    exits = [ExitPoint(name, 0.1, t, right, 0.0) for name, points in figures.items() for t, right in points]
    best = [(e.criterion, e.iterations, e.accuracy) for e in best_exits(exits)]
    assert best == [("kl", 1, 0.2), ("kl", 2, 0.6), ("kl", 4, 0.7), ("cosine", 1, 0.3)]
    assert best_exits([]) == []


def test_distances_of_token_are_those_of_its_last_position():
    made = tiny.reasoner(loop={"workspace": "token", "halting_head": True})
    (path,) = measure_distances(made, [tiny.PROMPTS[1]], 4)
    request = tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 4, "criterion": "fixed"}, trace=True)
    for measured, record in zip(path, generate(made, [request])[0].records, strict=True):
        for name in ("norm", "relative_change", "cosine"):
            expected = getattr(record, name)
            assert measured[name] == (None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6)), name
    assert [measured["survival"] for measured in path] == sorted((m["survival"] for m in path), reverse=True)
