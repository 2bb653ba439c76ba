import json
import random

import pytest

from slr_core.errors import DataError
from slr_core.tasks.base import Example, read_jsonl
from slr_core.training.data import Collator, StageStream, check_longest
from slr_core.training.held_out import GENERATED, held_out_sets, write_held_out
from slr_core.training.sources import split_held_out
from slr_core.training.trainer import train
from tests import tiny
from tests.training.recipe import DATA, recipe

EXAMPLES = [Example(f"q{i % 20}", (), f"a{i}") for i in range(30)]


def test_split():
    training, kept_out = split_held_out(EXAMPLES, 5, "file")
    asked = {example.question for example in kept_out}
    assert len(asked) == 5
    assert not asked & {example.question for example in training}
    assert sorted(training + kept_out, key=EXAMPLES.index) == EXAMPLES
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert {example.question for example in split_held_out(shuffled, 5, "file")[1]} == asked
    assert split_held_out(EXAMPLES, 0, "file") == (EXAMPLES, [])


@pytest.mark.parametrize("count", [20, 21])
def test_something_is_left(count):
    with pytest.raises(DataError, match="file: held_out must be below its 20 different questions"):
        split_held_out(EXAMPLES, count, "file")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(example.to_json()) + "\n" for example in EXAMPLES))
    return str(path)


def stage(*data):
    return {"steps": 1, "iterations": 1, "data": list(data)}


def words(file, **changes):
    base = {**DATA["base"], "tokenizer": "words"}
    return recipe(base=base, objectives={"answer": 1}, stages=[stage({"task": "text", "file": file})], **changes)


def test_no_step_sees_them(file):
    config = words(file, held_out=5)
    (found,) = held_out_sets(config)
    asked = {example.question for example in found.examples}
    ((source,),) = StageStream(config).sources
    assert len(asked) == 5
    assert not asked & {example.question for example in source.examples}


def test_written_and_read(file, tmp_path):
    (found,) = held_out_sets(words(file, held_out=5))
    write_held_out(found, tmp_path)
    assert read_jsonl(tmp_path / "held_out_text.jsonl") == list(found.examples)


def test_none_without_the_setting(file):
    assert held_out_sets(words(file)) == []


def test_generated_are_fresh(file):
    """Another seed than any step's, and not those of the file beside them."""
    graphs = DATA["stages"][1]["data"]
    config = recipe(objectives={"answer": 1}, held_out=3, stages=[stage(*graphs, {"task": "text", "file": file})])
    generated, kept_out = held_out_sets(config)
    assert (generated.task, generated.generated, len(generated.examples)) == ("prosqa", True, GENERATED)
    assert (kept_out.task, kept_out.generated) == ("text", False)
    trained = {item.example.question for batch in StageStream(config) for item in batch}
    assert not trained & {example.question for example in generated.examples}


def test_control_answers_without_loop(file, tmp_path):
    folder = train(words(file, held_out=5, max_iterations=0, output_dir=tmp_path / "out"))
    (result,) = json.loads((folder / "training.json").read_text())["held_out"]
    assert (result["converged"], result["iterations"]) == (None, 0)
    assert "the control without a loop" in (folder / "README.md").read_text()


# -- questions that do not fit the model ---------------------------------------------------------------------


def test_longest_is_checked(file):
    config = words(file)
    stream = StageStream(config)
    collator = Collator(tiny.tokenizer(), config, room=[10, 3])
    check_longest(stream, collator)
    with pytest.raises(
        DataError, match="a question of 1 tokens and the 2 written after it do not fit: with 1 iterations"
    ):
        check_longest(stream, Collator(tiny.tokenizer(), config, room=[10, 2]))


def test_loader_process_says_it_in_one_line(tmp_path):
    """A generated question that is too long is found by the process that loads the batches."""
    base = {**DATA["base"], "max_position_embeddings": 16}
    with pytest.raises(DataError, match=r"^a question of \d+ tokens and the \d+ written after it do not fit[^\n]*$"):
        train(recipe(base=base, output_dir=tmp_path / "out"))


SMALL = {**DATA["base"], "model_type": "gpt2"}
HOPS = {"nodes": 8, "min_hops": 3, "max_hops": 3}


@pytest.mark.parametrize("name", ["cot", "codi", "cot_states"])
@pytest.mark.slow
def test_chain_beside_the_loop_must_fit(name, tmp_path):
    """A GPT-2 has a table of positions: past it, the un-looped chain would be an index error."""
    stages = [{"steps": 1, "iterations": 1, "data": [{"task": "prosqa", "generator_options": HOPS, "questions": 4}]}]
    changes = {"base": {**SMALL, "max_position_embeddings": 24}, "objectives": {"answer": 1.0, name: 1.0}}
    with pytest.raises(DataError, match="do not fit: with 0 iterations the model has 24 positions"):
        train(recipe(**changes, chains=0, stages=stages, output_dir=tmp_path / "out"))


@pytest.mark.slow
def test_questions_must_fit_the_teacher(tmp_path):
    base, terms = {**SMALL, "max_position_embeddings": 28}, {"answer": 1.0}
    first, second = DATA["stages"]
    teacher = train(recipe(base=base, chains=0, stages=[first], objectives=terms, output_dir=tmp_path / "one"))
    changes = {"base": SMALL, "teacher": str(teacher), "objectives": {**terms, "teacher_states": 1.0}}
    with pytest.raises(DataError, match="do not fit: with 4 iterations the model has 24 positions"):
        train(recipe(**changes, chains=0, stages=[second], output_dir=tmp_path / "two"))


@pytest.mark.slow
def test_held_out_questions_that_do_not_fit(tmp_path, capsys):
    """The loop's default length needs more positions than this training: the model is trained all the same."""
    base, stages = {**DATA["base"], "max_position_embeddings": 18}, [{**DATA["stages"][0], "iterations": 1}]
    folder = train(recipe(base=base, stages=stages, output_dir=tmp_path / "out"))
    assert "held-out questions, prosqa: not answered (prompt has" in capsys.readouterr().err
    assert json.loads((folder / "training.json").read_text())["held_out"] == []
    assert (folder / "README.md").exists()


def test_unknown_words_are_told(tmp_path, capsys):
    task = {"task": "state_tracking", "generator_options": {"elements": 3, "length": 2}}
    for tokenizer, told in (("prosqa", True), ("words", False)):
        base = {**DATA["base"], "tokenizer": tokenizer}
        train(recipe(base=base, objectives={"answer": 1}, stages=[stage(task)], output_dir=tmp_path / tokenizer))
        assert ("the tokenizer does not know" in capsys.readouterr().err) == told
