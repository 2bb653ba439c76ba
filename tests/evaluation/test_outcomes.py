import json

import pytest

from slr_core.evaluation.outcomes import Answered, Outcome, key_of
from slr_core.generation.reference import generate
from slr_core.tasks.base import Example
from tests import tiny
from tests.evaluation.asked import outcome


@pytest.mark.parametrize("made", [outcome(), outcome(answer=None, contraction_rate=None, flops=None, iterations=2.5)])
def test_an_outcome_goes_through_a_file(made):
    assert Outcome.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_what_is_no_outcome_is_refused():
    data = outcome().to_json()
    del data["tokens"]
    with pytest.raises(KeyError):
        Outcome.from_json(data)
    with pytest.raises(TypeError):
        Outcome.from_json(["key"])


def test_a_question_is_named_by_its_place_and_its_text():
    example = Example("w1 w2", (), "w3")
    assert key_of(3, example) == key_of(3, Example("w1 w2", ("other",), "w4"))
    assert len({key_of(3, example), key_of(4, example), key_of(3, Example("w1 w3", (), "w3"))}) == 3


def test_an_answer_of_the_loop_says_what_the_loop_did():
    made = tiny.reasoner()
    result = generate(made, [tiny.request(made, tiny.PROMPTS[1])])[0]
    answered = Answered.of(result, 7.0, 9)
    assert (answered.text, answered.iterations, answered.exit_reason) == (
        result.text,
        result.iterations,
        result.exit_reason,
    )
    assert answered.relative_change == tuple(record.relative_change for record in result.records)
    assert len(answered.relative_change) == result.iterations > 0
    assert (answered.prompt_tokens, answered.tokens) == (5, len(result.token_ids))
    assert (answered.forward_passes, answered.flops, answered.added_parameters) == (result.forward_passes, 7.0, 9)
    plain = generate(made, [tiny.request(made, tiny.PROMPTS[1], {"max_iterations": 0})])[0]
    assert Answered.of(plain, 7.0, 9).added_parameters == 0


def test_rollouts_together_cost_their_sum_and_iterate_their_mean():
    rollouts = [
        Answered(
            "a", 2, "converged", (0.5, 0.1), 0.2, False, 5, tokens=3, forward_passes=6, flops=10.0, added_parameters=8
        ),
        Answered(
            "b", 5, "max_iterations", (0.7,), 0.9, True, 5, tokens=4, forward_passes=9, flops=20.0, added_parameters=8
        ),
    ]
    both = Answered.together("b", rollouts)
    expected = Answered("b", 3.5, "converged", (0.5, 0.1), 0.2, True, 5, 7, 15, flops=30.0, added_parameters=8)
    assert both == expected


def test_rollouts_of_a_model_out_of_sight_have_no_operations():
    both = Answered.together("a", [Answered("a"), Answered("b")])
    assert both.flops is both.added_parameters is None
