import json

import pytest

from slr_core.errors import DataError
from slr_core.evaluation.outcomes import MethodAnswer, Outcome, question_key
from slr_core.generation.reference import generate
from slr_core.tasks.base import Example
from tests import tiny
from tests.evaluation.asked import outcome


@pytest.mark.parametrize("made", [outcome(), outcome(answer=None, contraction_rate=None, flops=None, iterations=2.5)])
def test_an_outcome_goes_through_a_file(made):
    assert Outcome.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_what_is_no_outcome_is_refused():
    data = outcome().to_json()
    for field, value in {"seconds": "x", "correct": "yes", "relative_change": [None, "0.5"], "tokens": None}.items():
        with pytest.raises(DataError, match=field):
            Outcome.from_json({**data, field: value})
    del data["tokens"]
    with pytest.raises(DataError, match="tokens: Field required"):
        Outcome.from_json(data)
    with pytest.raises(DataError):
        Outcome.from_json(["key"])


def test_a_question_is_named_by_its_place_and_its_text():
    example = Example("w1 w2", (), "w3")
    assert question_key(3, example) == question_key(3, Example("w1 w2", ("other",), "w4"))
    assert len({question_key(3, example), question_key(4, example), question_key(3, Example("w1 w3", (), "w3"))}) == 3


def test_an_answer_of_the_loop_says_what_the_loop_did():
    made = tiny.reasoner()
    result = generate(made, [tiny.request(made, tiny.PROMPTS[1])])[0]
    answered = MethodAnswer.from_result(result, 7.0, 9)
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
    assert MethodAnswer.from_result(plain, 7.0, 9).added_parameters == 0


def test_rollouts_together_cost_their_sum_and_iterate_their_mean():
    rollouts = [
        MethodAnswer(
            "a", 2, "converged", (0.5, 0.1), 0.2, False, 5, tokens=3, forward_passes=6, flops=10.0, added_parameters=8
        ),
        MethodAnswer(
            "b", 5, "max_iterations", (0.7,), 0.9, True, 5, tokens=4, forward_passes=9, flops=20.0, added_parameters=8
        ),
    ]
    both = MethodAnswer.combine("b", rollouts)
    expected = MethodAnswer("b", 3.5, "converged", (0.5, 0.1), 0.2, True, 5, 7, 15, flops=30.0, added_parameters=8)
    assert both == expected


def test_rollouts_of_a_model_out_of_sight_have_no_operations():
    both = MethodAnswer.combine("a", [MethodAnswer("a"), MethodAnswer("b")])
    assert both.flops is both.added_parameters is None
