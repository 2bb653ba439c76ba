"""The logit lens, thoughts in words, and the paths of states."""

import json
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from slr_core import tasks
from slr_core.checkpoint.folder import DEFAULT_CHECKPOINT
from slr_core.errors import DataError
from slr_core.evaluation.lens import EXAMPLES, measure_movement, project_trajectories, read_lens
from slr_core.evaluation.probes import READOUT, CollectedStates, ProbeScore, collect_states
from slr_core.evaluation.state_analysis import StateAnalysis
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from tests import tiny
from tests.tiny import LATENT_DECODER, WORKSPACES, reasoner

EASY, HARD = ("s",), ("s", "s")
ASKED = [Example(prompt, HARD if i % 2 else EASY, "w1") for i, prompt in enumerate(tiny.PROMPTS)]


class Steps(tasks.Task):
    """Difficulty is the number of steps; the answer w1 is right."""

    name = "steps"

    def extract(self, text: str) -> str | None:
        return text or None

    def grade(self, example: Example, text: str) -> bool:
        return text == example.answer


def collected_with(tokens: torch.Tensor, states: torch.Tensor) -> CollectedStates:
    count = len(tokens)
    return CollectedStates(
        states.shape[1] - 1, {READOUT: states}, tokens, ("",) * count, (False,) * count, ((),) * count
    )


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_readings_are_the_head_at_every_state(workspace):
    made = reasoner(loop=WORKSPACES[workspace])
    collected = collect_states(made, Steps(), ASKED, batch_size=3)
    lens = read_lens(made, Steps(), ASKED, collected)
    first = 0 if workspace == "append" else 1
    assert [r.t for r in lens.readings] == list(range(first, made.config.loop.max_iterations + 1))
    for reading in lens.readings:
        with torch.inference_mode():
            p = made.head(collected.states[READOUT][:, reading.t]).softmax(-1)
        assert reading.questions == len(ASKED)
        assert reading.entropy == pytest.approx(float(torch.special.entr(p).sum(-1).mean()), abs=1e-4)
        assert reading.answer == pytest.approx(float(p.gather(1, collected.tokens[:, None]).mean()), abs=1e-5)
        assert reading.settled == pytest.approx(float((p.argmax(-1) == collected.tokens).float().mean()))
        assert reading.frontier is None
        commonest = max(p.argmax(-1).tolist().count(token) for token in p.argmax(-1).tolist())
        assert reading.common[0][1] == pytest.approx(commonest / len(ASKED))


def test_entropies_are_those_of_the_trace():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    lens = read_lens(made, Steps(), ASKED, collected)
    for reading in lens.readings[1:]:
        traced = [records[reading.t - 1].entropy for records in collected.records]
        assert reading.entropy == pytest.approx(sum(traced) / len(traced), abs=1e-4)


def test_first_answer_token():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED, iterations=2)
    loop = LoopParams(criterion="fixed", max_iterations=2, min_iterations=2)
    for i, result in enumerate(generate(made, [prepare(made, e.question, loop) for e in ASKED])):
        assert collected.tokens[i] == result.token_ids[0]
        assert collected.texts[i] == result.text
        assert collected.right[i] == (result.text == "w1")
    # In this workspace the answer is read at the last state itself.
    assert read_lens(made, Steps(), ASKED, collected).readings[-1].settled == 1.0


def test_every_difficulty_has_readings_of_its_own_questions():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    lens = read_lens(made, Steps(), ASKED, collected)
    assert list(lens.by_difficulty) == [1, 2]
    for t, whole in enumerate(lens.readings):
        parts = [lens.by_difficulty[level][t] for level in (1, 2)]
        assert sum(part.questions for part in parts) == whole.questions
        mean = sum(part.entropy * part.questions for part in parts) / whole.questions
        assert mean == pytest.approx(whole.entropy, abs=1e-5)
    hard = [e for e in ASKED if e.steps == HARD]
    alone = read_lens(made, Steps(), hard, collect_states(made, Steps(), hard))
    for a, b in zip(alone.readings, lens.by_difficulty[2], strict=True):
        assert a.entropy == pytest.approx(b.entropy, abs=1e-4)


def test_early_exits_are_left_out():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    whole = read_lens(made, Steps(), ASKED, collected)
    collected.states[READOUT][1:, 3:] = torch.nan
    lens = read_lens(made, Steps(), ASKED, collected)
    assert lens.readings[2] == whole.readings[2]
    assert [r.questions for r in lens.readings] == [8, 8, 8, 1, 1, 1]
    assert [len(told.readings) for told in lens.examples] == [6, 3, 3]
    collected.states[READOUT][0, 3:] = torch.nan
    assert len(read_lens(made, Steps(), ASKED, collected).readings) == 3


def test_examples_tell_the_first_questions_iteration_by_iteration():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    told = read_lens(made, Steps(), ASKED, collected).examples
    assert [t.question for t in told] == [e.question for e in ASKED[:EXAMPLES]]
    for i, one in enumerate(told):
        assert one.text == collected.texts[i]
        assert len(one.readings) == made.config.loop.max_iterations + 1
        with torch.inference_mode():
            p = made.head(collected.states[READOUT][i]).softmax(-1).max(-1)
        assert [tiny.WORDS[k] for k in p.indices.tolist()] == [word for word, _ in one.readings]
        assert [c for _, c in one.readings] == pytest.approx(p.values.tolist(), abs=1e-5)
        assert set(one.thoughts) == {None}


def test_thoughts_with_latent_decoder():
    made = reasoner(loop={"decoder": {"latent_decoder": LATENT_DECODER}})
    collected = collect_states(made, Steps(), ASKED)
    lens = read_lens(made, Steps(), ASKED, collected)
    traced = [[record.thought for record in records] for records in collected.records]
    assert [list(told.thoughts) for told in lens.examples] == traced[:EXAMPLES]
    assert lens.readings[0].thoughts == ()
    for reading in lens.readings[1:]:
        said = [thoughts[reading.t - 1] for thoughts in traced]
        steps = [example.steps[reading.t - 1] for example in ASKED if reading.t <= len(example.steps)]
        said_steps = [x.strip() for x, example in zip(said, ASKED, strict=True) if reading.t <= len(example.steps)]
        equal = [x == step.strip() for x, step in zip(said_steps, steps, strict=True)]
        assert reading.thought_is_step == (sum(equal) / len(equal) if equal else None)
        thought, share = reading.thoughts[0]
        assert share == max(said.count(x) for x in said) / len(said)
        assert said.count(thought) == share * len(said)


# -- the ProsQA frontier ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> LatentReasoner:
    return LatentReasoner.from_pretrained(str(DEFAULT_CHECKPOINT))


def prosqa(count: int) -> list[Example]:
    return list(islice(tasks.get_task("prosqa").generate(0, nodes=10, min_hops=2, max_hops=3, balanced=True), count))


def test_bundled_frontier_then_answer(bundled):
    examples = prosqa(8)
    collected = collect_states(bundled, tasks.get_task("prosqa"), examples, iterations=5)
    lens = read_lens(bundled, tasks.get_task("prosqa"), examples, collected)
    by_t = {r.t: r for r in lens.readings}
    far = sum(len(e.steps) == 3 for e in examples)
    assert [by_t[t].frontier_questions for t in range(6)] == [8, 8, 8, far, 0, 0]
    for t in range(4):
        assert by_t[t].frontier > 0.7
    assert by_t[4].frontier is by_t[5].frontier is None
    assert by_t[1].answer < 0.1  # still on its way
    assert by_t[5].answer > 0.9
    assert by_t[5].settled == 1.0


def test_frontier_needs_single_tokens():
    made = reasoner(text={"max_new_tokens": 1})  # its tokenizer knows no word of the question
    examples = [replace(e, question=tiny.words(1, 2)) for e in prosqa(2)]
    lens = read_lens(made, tasks.get_task("prosqa"), examples, collect_states(made, tasks.get_task("prosqa"), examples))
    assert {r.frontier for r in lens.readings} == {None}
    assert {r.frontier_questions for r in lens.readings} == {0}


# -- how states move --------------------------------------------------------------------------------------


def test_movement_is_the_quartiles_of_what_the_loops_measured():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    moved = measure_movement(collected)
    assert len(moved.relative_change) == len(moved.contraction) == made.config.loop.max_iterations
    assert moved.contraction[0] is None
    for t in range(1, made.config.loop.max_iterations):
        for name in ("relative_change", "contraction"):
            values = sorted(getattr(records[t], name) for records in collected.records)
            spread = getattr(moved, name)[t]
            assert spread.median == pytest.approx((values[3] + values[4]) / 2)
            assert values[1] <= spread.low <= values[2]
            assert values[5] <= spread.high <= values[6]


def test_movement_past_the_end_of_every_loop_is_undefined():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    short = replace(collected, records=tuple(records[:2] for records in collected.records))
    assert measure_movement(short).relative_change[2:] == (None,) * 3
    assert measure_movement(short).relative_change[:2] == measure_movement(collected).relative_change[:2]


def line(length: float, count: int = 6) -> torch.Tensor:
    """States of ``count`` questions that march along one direction of five, with a little across."""
    along = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]) / 5
    across = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])
    sway = torch.tensor([-1.0, 1.0]).repeat(count // 2)
    return torch.stack([along * length * t + 0.1 * sway[:, None] * across for t in range(4)], dim=1)


def test_trajectories_find_the_direction_in_which_states_move():
    examples = [Example(f"q{i}", HARD if i % 2 else EASY, "") for i in range(6)]
    collected = collected_with(torch.zeros(6, dtype=torch.long), line(2.0))
    paths = project_trajectories(collected, Steps(), examples)
    assert paths is not None
    assert paths.first == 0
    assert paths.explained[0] > 0.99
    assert sum(paths.explained) == pytest.approx(1)
    assert list(paths.paths) == [1, 2]
    for path in paths.paths.values():
        steps = [b[0] - a[0] for a, b in pairwise(path)]
        assert steps == pytest.approx([2.0] * 3)  # forward: the sign of the component is fixed
    across = [path[0][1] for path in paths.paths.values()]
    assert across == pytest.approx([-0.1, 0.1], abs=1e-6)
    assert [level for level, _ in paths.points] == [1, 2] * 3


def test_trajectories_skip_early_exits():
    states = line(1.0)
    states[:, 0] = torch.nan
    states[2, 3] = torch.inf
    examples = [Example(f"q{i}", (), "") for i in range(6)]
    collected = collected_with(torch.zeros(6, dtype=torch.long), states)
    paths = project_trajectories(collected, Steps(), examples)
    assert paths is not None
    assert paths.first == 1
    assert len(paths.points) == 5
    assert {len(path) for _, path in paths.points} == {3}
    states[1:] = torch.nan
    assert project_trajectories(collected, Steps(), examples) is None


@pytest.mark.slow
def test_json_round_trip():
    made = reasoner()
    collected = collect_states(made, Steps(), ASKED)
    score = ProbeScore("answer", "readout", "mlp", 1, "accuracy", 0.5, (0.25, 0.75), 0.125, 0.25, 7, 3)
    lens, paths = read_lens(made, Steps(), ASKED, collected), project_trajectories(collected, Steps(), ASKED)
    for found in (
        StateAnalysis(3, 0.5, lens, measure_movement(collected), paths, (score,)),
        StateAnalysis(3, 0.5, lens, measure_movement(collected), None, ()),
    ):
        again = StateAnalysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
        assert again == found
        drawn = found.plots()
        assert again.plots() == drawn
        assert ("trajectories" in drawn, "probes" in drawn) == (found.trajectories is paths,) * 2


def test_what_was_not_found_inside_is_refused():
    with pytest.raises(DataError, match="lens"):
        StateAnalysis.from_json({"iterations": 3, "accuracy": 0.5})
