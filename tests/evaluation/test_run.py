"""Runs: every question answered once, and an interruption that leaves no mark."""

import json
import time
from dataclasses import replace
from statistics import fmean

import pytest

from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, NOISY_START, MethodSettings, get_method
from slr_core.evaluation.outcomes import question_key
from slr_core.evaluation.run import identify_model, run_method, run_spec
from slr_core.evaluation.statistics import summarize
from slr_core.evaluation.store import Store
from slr_core.generation.reference import generate
from slr_core.training.trainer import MANIFEST
from tests import tiny
from tests.evaluation.asked import Words, examples, questions

ALL = {**METHODS, NOISY_START.name: NOISY_START}
SETTINGS = MethodSettings({"threshold": 0.45}, cot_tokens=3, samples=2, beams=2, noise=0.5, temperature=1.0, seed=3)
QUESTIONS = examples(10)


class Counting(Local):
    """Notes every prompt that it is asked."""

    def __init__(self, reasoner):
        super().__init__(reasoner)
        self.asked = []

    def answer(self, prompts, ask, seeds, run_loop=None):
        self.asked += prompts
        return super().answer(prompts, ask, seeds, run_loop)


@pytest.fixture(scope="module")
def reasoner():
    return tiny.reasoner(text={"max_new_tokens": 3})


@pytest.fixture
def backend(reasoner):
    return Counting(reasoner)


class Killed(Exception):
    pass


class Dying(Store):
    """Dies after so many outcomes, in the middle of a line."""

    def __init__(self, path, after):
        super().__init__(path)
        self.left = after

    def add(self, run, outcome):
        if self.left == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"of": run.id, **outcome.to_json()})[:40])
            raise Killed
        self.left -= 1
        super().add(run, outcome)


def untimed(outcomes):
    return [replace(outcome, seconds=0.0) for outcome in outcomes]


def roughly(outcomes):
    """What must not change with the batch: rounding does."""
    return [replace(o, seconds=0.0, relative_change=(), contraction_rate=None) for o in outcomes]


def answer(name, backend, store=None, settings=SETTINGS, **options):
    store = store or Store()
    run = store.open({"method": name})
    options = {"batch_size": 4, **options}
    return run_method(ALL[name], backend, Words(), QUESTIONS, settings, store=store, run=run, **options)


@pytest.mark.parametrize(("name", "after"), [*((name, 6) for name in ALL), ("slr", 0), ("slr", 4)])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(backend, tmp_path, name, after):
    path = tmp_path / "results.jsonl"
    whole = answer(name, backend)
    with pytest.raises(Killed):
        answer(name, backend, Dying(path, after))
    assert len(Store(path).open({"method": name}).outcomes) == after
    # What reaches into the model computes a question beside the same others again; the engine beside whoever is there.
    alike = roughly if ALL[name].remote else untimed
    assert alike(answer(name, backend, Store(path))) == alike(whole)
    again = Store(path).open({"method": name}).outcomes
    assert alike(again.values()) == alike(whole)
    assert len(path.read_text().splitlines()) == 1 + len(QUESTIONS)


def test_nothing_is_answered_twice(backend, tmp_path):
    path = tmp_path / "results.jsonl"
    told = []
    answer("slr", backend, Store(path), progress=told.append)
    assert sorted(backend.asked) == sorted(example.question for example in QUESTIONS)
    assert told == [0, 0, 0, 4, 4, 2]
    backend.asked, told = [], []
    outcomes = answer("slr", backend, Store(path), progress=told.append)
    assert backend.asked == []
    assert sum(told) == len(outcomes) == 10
    answer("no_cot", backend, Store(path))
    assert len(backend.asked) == 10, "another run is not done yet"


def test_interrupted_batch(backend, tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(Killed):
        answer("slr", backend, Dying(path, 6))
    kept = dict(Store(path).open({"method": "slr"}).outcomes)
    backend.asked, told = [], []
    outcomes = answer("slr", backend, Store(path), progress=told.append)
    assert sorted(backend.asked) == sorted(example.question for example in QUESTIONS[4:])
    assert told == [4, 2, 0, 2, 2]
    assert {outcome.key: outcome for outcome in outcomes[:6]} == kept


class SlowStart(Counting):
    """The first answer takes a second longer than the others."""

    def answer(self, prompts, options, seeds, run_loop=None):
        if not self.asked:
            time.sleep(1)
        return super().answer(prompts, options, seeds, run_loop)


@pytest.mark.slow
def test_first_method_does_not_pay_for_the_start(reasoner):
    backend = SlowStart(reasoner)
    started = time.perf_counter()
    first, second = (sum(o.seconds for o in answer(name, backend, warm_up=True)) for name in ("slr", "slr_fixed"))
    assert time.perf_counter() - started > 1
    assert max(first, second) < 1
    assert len(backend.asked) == 2 * (len(QUESTIONS) + 1)
    cold = SlowStart(reasoner)
    assert sum(o.seconds for o in answer("slr", cold)) > 1, "without a warm-up it does"


def test_same_prompts_cost_the_second_method_as_much(backend):
    """No prefix cache carries prompts from one method to the next."""
    for name in ("slr", "slr_fixed"):
        answer(name, backend)
    assert backend.engine.counters.reused_tokens == 0


@pytest.mark.parametrize("name", sorted(set(ALL) - {"pause", "no_thought", "pause_as_thought", "multipass_pause"}))
def test_the_batch_size_changes_no_answer(backend, name):
    whole = roughly(answer(name, backend, batch_size=64))
    for size in (1, 3):
        assert roughly(answer(name, backend, batch_size=size)) == whole


def test_outcomes_are_the_results_graded(backend):
    outcomes = answer("slr", backend, settings=replace(SETTINGS, loop={"max_iterations": 4}))
    made, task = backend.reasoner, Words()
    for index, (example, outcome) in enumerate(zip(QUESTIONS, outcomes, strict=True)):
        (result,) = generate(made, [tiny.request(made, example.question, {"max_iterations": 4}, max_new_tokens=3)])
        assert outcome.key == question_key(index, example)
        assert (outcome.text, outcome.iterations, outcome.exit_reason) == (
            result.text,
            result.iterations,
            result.exit_reason,
        )
        assert (outcome.answer, outcome.correct) == (task.extract(result.text), task.grade(example, result.text))
        assert outcome.difficulty == len(example.steps)
        assert outcome.forward_passes == result.forward_passes
        assert outcome.relative_change == pytest.approx([r.relative_change for r in result.records], rel=1e-3)
    figures = summarize(outcomes)
    assert 0 < figures.accuracy == fmean(outcome.correct for outcome in outcomes) < 1


def test_methods_differ(backend):
    answers = {name: [o.text for o in answer(name, backend)] for name in ("slr", "no_cot", "slr_vote", "beam")}
    assert len({tuple(texts) for texts in answers.values()}) == 4
    assert len({outcome.iterations for outcome in answer("slr", backend)}) > 2


@pytest.mark.parametrize("name", ["self_consistency", "best_of_n", "slr_vote", "noised_thoughts", "shuffled_thoughts"])
def test_another_seed_draws_anew(backend, name):
    def drawn(seed):
        return [o.text for o in answer(name, backend, settings=replace(SETTINGS, noise=1.0, seed=seed))]

    first = drawn(3)
    assert drawn(3) == first
    assert any(drawn(seed) != first for seed in range(3))


def test_questions_that_are_alike_are_answered_one_by_one(backend):
    twice = (QUESTIONS[0], QUESTIONS[0])
    outcomes = run_method(METHODS["slr"], backend, Words(), twice, SETTINGS)
    assert len({outcome.key for outcome in outcomes}) == len(backend.asked) == 2


# -- specs -----------------------------------------------------------------------------------------------


def test_a_spec_tells_everything_apart_that_decides_outcomes():
    three = questions(3)

    def spec(method="slr", asked=three, model="tiny", **settings):
        return json.dumps(run_spec(get_method(method), MethodSettings({}, **settings), Words(), asked, {"name": model}))

    others = [
        spec(method="slr_fixed"),
        spec(asked=questions(4)),
        spec(asked=replace(three, sha256="0" * 64)),
        spec(model="other"),
        spec(seed=1),
        spec(noise=0.2),
        json.dumps(
            run_spec(get_method("slr"), MethodSettings({"max_iterations": 3}), Words(), three, {"name": "tiny"})
        ),
    ]
    assert spec() == spec()
    assert len({spec(), *others}) == 1 + len(others)


def test_a_models_hash_is_that_of_its_files(tmp_path):
    folder = tmp_path / "model"
    (folder / "base").mkdir(parents=True)
    (folder / "slr_config.json").write_text("{}")
    (folder / "base" / "model.safetensors").write_bytes(b"weights")
    before = identify_model(str(folder))
    assert before["name"] == "model"
    assert len(before["sha256"]) == 64
    (folder / "README.md").write_text("words")
    (folder / "steps" / "000100").mkdir(parents=True)
    (folder / "steps" / "000100" / "model.safetensors").write_bytes(b"of the training run")
    (folder / MANIFEST).write_text('{"seconds": 1}')
    (folder / "eval.json").write_text('{"accuracy": 1}')
    (folder / "runs").mkdir()
    (folder / "runs" / "model.safetensors").write_bytes(b"of a run that began from this model")
    assert identify_model(str(folder)) == before == identify_model(str(folder) + "/.")
    (folder / "base" / "model.safetensors").write_bytes(b"weightS")
    changed = identify_model(str(folder))
    (folder / "base" / "model.safetensors").rename(folder / "base" / "other.safetensors")
    renamed = identify_model(str(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({known["sha256"] for known in (before, changed, renamed, identify_model(str(folder)))}) == 4


def test_a_model_elsewhere_is_known_by_its_name():
    assert identify_model("owner/name") == {"name": "owner/name"}
    assert identify_model(None) == identify_model(str(DEFAULT_CHECKPOINT))
    assert identify_model(None)["name"] == "prosqa"
    assert identify_model("prosqa") == identify_model(None)


def test_another_precision_is_another_model():
    """Results of one are not taken for those of the other."""
    chosen = [("auto", "none"), ("bfloat16", "none"), ("auto", "int4"), ("bfloat16", "int4")]
    assert len({json.dumps(identify_model(None, *precision)) for precision in chosen}) == 4
