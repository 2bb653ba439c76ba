"""The checkpoints that ship: what its model card claims, measured."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slr_core.checkpoint.folder import BUNDLED_FOLDER, CONFIG, DEFAULT_CHECKPOINT, bundled_names
from slr_core.checkpoint.pretrained import PACKAGED
from slr_core.config import SLRConfig
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, MethodSettings
from slr_core.evaluation.outcomes import Outcome
from slr_core.evaluation.run import run_method
from slr_core.evaluation.statistics import summarize, summarize_by_difficulty
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from slr_core.tasks.prontoqa import ProntoQA, generate_prontoqa
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate_prosqa
from slr_core.tasks.registry import get_task

SEED = 4711  # not the seed of the card's figures, nor one that training used
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "prosqa.json"


@pytest.fixture(scope="module")
def reasoner() -> LatentReasoner:
    return LatentReasoner.from_pretrained()


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    return list(islice(generate_prosqa(GraphSpec(10, 2, 4, balanced=True), SEED), 500))


@pytest.fixture(scope="module")
def answers(reasoner: LatentReasoner, questions: list[Example]) -> list[Outcome]:
    return run_method(METHODS["slr"], Local(reasoner), ProsQA(), questions, MethodSettings({}))


def test_answers_balanced_questions(answers: list[Outcome], questions: list[Example]) -> None:
    assert summarize(answers).accuracy >= 0.95
    assert all(ProsQA().baselines(question) == {"depth_rule": 0.5} for question in questions)


def test_needs_its_loop(reasoner: LatentReasoner, questions: list[Example], answers: list[Outcome]) -> None:
    without = run_method(METHODS["no_cot"], Local(reasoner), ProsQA(), questions, MethodSettings({}))
    assert summarize(without).accuracy < summarize(answers).accuracy - 0.2


def test_stops_by_itself_and_later_on_longer_paths(answers: list[Outcome]) -> None:
    overall = summarize(answers)
    assert overall.converged > 0.95
    assert overall.diverged == 0
    iterations = [summary.iterations for summary in summarize_by_difficulty(answers).values()]
    assert iterations == sorted(iterations)
    assert iterations[-1] - iterations[0] > 1


@pytest.mark.slow
def test_going_on_past_its_depth_makes_no_answer_worse(reasoner: LatentReasoner, questions: list[Example]) -> None:
    few, forced = questions[:100], {}
    for t in (8, 16, 24, 32):
        settings = MethodSettings({"max_iterations": t, "min_iterations": t})
        forced[t] = summarize(run_method(METHODS["slr_fixed"], Local(reasoner), ProsQA(), few, settings)).accuracy
    assert min(forced.values()) >= max(forced.values()) - 0.01
    assert max(forced.values()) >= 0.95


def test_relative_change_falls(answers: list[Outcome]) -> None:
    for summary in summarize_by_difficulty(answers).values():
        first, *_, last = summary.relative_change
        assert last < first / 2


def test_no_iterations_is_the_base_model(reasoner: LatentReasoner, questions: list[Example]) -> None:
    base = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT / "base").eval()
    settings = LoopParams(max_iterations=0)
    for example in questions[:20]:
        request = prepare(reasoner, example.question, settings, max_new_tokens=4)
        (result,) = generate(reasoner, [request])
        prompt = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            expected = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        assert list(result.token_ids) == expected[0, prompt.shape[1] :].tolist()


def test_a_mixed_batch_answers_as_each_question_alone(reasoner: LatentReasoner, questions: list[Example]) -> None:
    mixed = [
        LoopParams(),
        LoopParams(max_iterations=0),
        LoopParams(max_iterations=3),
        LoopParams(min_iterations=7),
        LoopParams(criterion="argmax_stable"),
    ]
    requests = [prepare(reasoner, e.question, mixed[i % len(mixed)]) for i, e in enumerate(questions[:60])]
    for request, together in zip(requests, generate(reasoner, requests), strict=True):
        (alone,) = generate(reasoner, [request])
        near = any(
            record.relative_change is not None
            and abs(record.relative_change - request.loop.threshold) < 1e-3 * request.loop.threshold
            for record in alone.records
        )
        assert near or (together.token_ids, together.iterations, together.exit_reason) == (
            alone.token_ids,
            alone.iterations,
            alone.exit_reason,
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_first_iteration_is_pefts_own_adapter(reasoner: LatentReasoner, questions: list[Example]) -> None:
    request = prepare(reasoner, questions[0].question)
    prompt = torch.tensor([request.prompt_ids])
    with torch.inference_mode():
        context = reasoner.encode(prompt, torch.ones_like(prompt))
        u1 = reasoner.timestep(reasoner.project_in(context.hidden), 1)
        g1, _ = reasoner.iterate(context, 1)

        plain = AutoModelForCausalLM.from_pretrained(DEFAULT_CHECKPOINT / "base").eval()
        peft = PeftModel.from_pretrained(plain, DEFAULT_CHECKPOINT / "loops" / "loop_01").eval()
        with peft.disable_adapter():
            cache = peft(input_ids=prompt, use_cache=True).past_key_values
        logits = peft(inputs_embeds=u1, past_key_values=cache, use_cache=True).logits
        expected = reasoner.head(g1)
    torch.testing.assert_close(expected, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", bundled_names())
def test_is_small_and_holds_nothing_that_can_run_code(name: str) -> None:
    shipped = BUNDLED_FOLDER / name
    files = [path for path in shipped.rglob("*") if path.is_file()]
    # One without its base has adapters of a language model, and the tokenizer.
    most = 10e6 if (shipped / "base").is_dir() else 40e6
    assert sum(path.stat().st_size for path in files) < most
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".jinja"}


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_names())
def test_loads(name: str) -> None:
    """Also one whose base comes from a package, if that is installed."""
    base = SLRConfig.from_json(BUNDLED_FOLDER / name / CONFIG).base
    if base in PACKAGED and find_spec(PACKAGED[base].module) is None:
        pytest.skip(f"the extra {base} is not installed")
    LatentReasoner.from_pretrained(name)


def test_card_quotes_the_committed_figures() -> None:
    card = (DEFAULT_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    figures, forced = record["figures"], record["forced"]
    for name, methods in figures.items():
        # The first such line is that of the methods, the second that of the forced loops.
        row, past = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        for figure in methods.values():
            assert f"{figure['overall']['accuracy']:.3f}" in row
        for accuracy in forced[name].values():
            assert f"{accuracy:.3f}" in past


def test_card_of_prosqa_large_quotes_the_rows_of_its_sweep() -> None:
    card = (BUNDLED_FOLDER / "prosqa-large" / "README.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS.parent / "findings" / "flagship.json").read_text(encoding="utf-8"))["rows"]
    assert {row["variant"] for row in rows} == {"prosqa", "prosqa-large"}
    for row in rows:
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {row['name']} |")]
        if row["variant"] == "prosqa-large" or not row["loop"]:
            assert f" {row['accuracy']:.3f} " in line, row["name"]


@pytest.mark.slow
def test_prosqa_large_follows_long_paths_in_large_graphs() -> None:
    questions = list(islice(generate_prosqa(GraphSpec(40, 7, 8, balanced=True), SEED), 200))
    accuracy = {}
    for name in ("prosqa", "prosqa-large"):
        backend = Local(LatentReasoner.from_pretrained(name))
        answers = run_method(METHODS["slr"], backend, ProsQA(), questions, MethodSettings({}))
        accuracy[name] = summarize(answers).accuracy
        assert summarize(answers).converged > 0.95
    assert accuracy["prosqa-large"] >= 0.87 > accuracy["prosqa"]


def test_prontoqa_proves_step_by_step_and_stays_where_it_is() -> None:
    questions = list(islice(generate_prontoqa(5, False, SEED), 100))
    backend = Local(LatentReasoner.from_pretrained("prontoqa"))
    own = run_method(METHODS["slr"], backend, ProntoQA(), questions, MethodSettings({}))
    assert summarize(own).accuracy >= 0.97
    assert summarize(own).converged > 0.95
    forced = MethodSettings({"max_iterations": 24, "min_iterations": 24})
    assert summarize(run_method(METHODS["slr_fixed"], backend, ProntoQA(), questions, forced)).accuracy >= 0.96
    without = run_method(METHODS["no_cot"], backend, ProntoQA(), questions, MethodSettings({}))
    assert summarize(without).accuracy < 0.7


def test_prontoqa_follows_rules_where_no_shortcut_does() -> None:
    backend = Local(LatentReasoner.from_pretrained("prontoqa"))
    for hops, least in ((3, 0.93), (5, 0.88), (7, 0.75)):
        questions = list(islice(generate_prontoqa(hops, True, SEED), 100))
        answers = run_method(METHODS["slr"], backend, ProntoQA(), questions, MethodSettings({}))
        assert summarize(answers).accuracy >= least, hops


def test_prontoqa_says_its_thoughts_in_words() -> None:
    reasoner = LatentReasoner.from_pretrained("prontoqa")
    for example in islice(generate_prontoqa(5, False, SEED), 5):
        request = prepare(reasoner, example.question, trace=True)
        (result,) = generate(reasoner, [request])
        assert [record.thought for record in result.records][:6] == list(example.steps)


@pytest.mark.slow
def test_word_problems_are_thought_through_in_soft_tokens() -> None:
    """Each thought reads as a token of a running calculation, and the loop ends where that does."""
    pytest.importorskip(PACKAGED["smollm2"].module, reason="the extra smollm2 is not installed")
    task = get_task("word_problems")
    reasoner = LatentReasoner.from_pretrained("smollm2-math")
    questions = list(islice(task.generate(SEED, max_steps=3, steps="running"), 48))
    answers = run_method(METHODS["slr"], Local(reasoner), task, questions, MethodSettings({}))
    assert summarize(answers).accuracy >= 0.45
    assert summarize(answers).converged >= 0.9
    two, three = (summary.iterations for summary in summarize_by_difficulty(answers).values())
    assert two < three - 3
    without = run_method(METHODS["no_cot"], Local(reasoner), task, questions, MethodSettings({}))
    assert summarize(without).accuracy <= 0.2
    question = "Anna has 12 apples. Ben has 3 times as many as Anna. Ben buys 5 more apples. How many apples "
    question += "does Ben have in the end?"
    (result,) = generate(reasoner, [prepare(reasoner, question, top_tokens=1)])
    assert result.text == "41"
    assert "".join(record.top_tokens[0][0] for record in result.records) == "2*3=36 +5 #"
