import json
import random
import signal
from contextlib import contextmanager
from itertools import islice
from statistics import mean, pstdev

import pytest
import torch

from slr_core.config import TextConfig
from slr_core.errors import DataError
from slr_core.tasks import get_task
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import GraphSpec, generate_prosqa
from slr_core.training.data import IGNORE, Collator, Item, LoopPlan, pad
from slr_core.training.graphs import draw_chains
from slr_core.training.sources import open_source
from slr_core.training.stages import DataConfig
from slr_core.training.tokenizer import prosqa_tokenizer
from slr_core.validation import validated
from tests import tiny
from tests.training.recipe import recipe

TOKENIZER = prosqa_tokenizer()

#   Tom -> rompus -> lempus -> numpus,  Tom -> worpus -> lempus;  Sam -> impus
HAND = Example(
    question="Tom is a rompus. Every rompus is a lempus. Sam is a impus. Tom is a worpus. "
    "Every worpus is a lempus. Every lempus is a numpus. Is Tom a impus or numpus?",
    steps=("Tom is a rompus.", "Every rompus is a lempus.", "Every lempus is a numpus."),
    answer="Tom is a numpus.",
    extra={
        "idx_to_symbol": ["Tom", "Sam", "rompus", "worpus", "lempus", "numpus", "impus"],
        "edges": [[0, 2], [2, 4], [1, 6], [0, 3], [3, 4], [4, 5]],
        "root": 0,
        "target": 5,
        "neg_target": 6,
    },
)
SHORT = Example(
    question="Sam is a impus. Tom is a rompus. Is Sam a impus or rompus?",
    steps=("Sam is a impus.",),
    answer="Sam is a impus.",
    extra={
        "idx_to_symbol": ["Sam", "Tom", "impus", "rompus"],
        "edges": [[0, 2], [1, 3]],
        "root": 0,
        "target": 2,
        "neg_target": 3,
    },
)
CHAINS = (
    ((("Tom", "lempus"), (("rompus", "worpus", "numpus"), ("lempus",))), (("Sam",), (("impus",),))),
    ((("Tom",), (("rompus",),)), (("Sam",), (("impus",),))),
)


def token(text):
    found = TOKENIZER.convert_tokens_to_ids(text)
    assert found != TOKENIZER.unk_token_id
    return found


def node(word):
    return token(word) if word[0].isupper() else token(f" is a {word}.")


def items(*examples, iterations=4, **fields):
    return [Item(example, LoopPlan(iterations), **fields) for example in examples or (HAND, SHORT)]


def collate(made=None, iterations=4, chains=CHAINS, tokenizer=TOKENIZER, text=None, **changes):
    collator = Collator(tokenizer, recipe(**changes), validated(TextConfig, text or {}))
    plan = LoopPlan(iterations)
    return collator(made or [Item(e, plan, own) for e, own in zip((HAND, SHORT), chains, strict=True)])


def terms(**weights):
    return {"objectives": {"answer": 1.0, **{name: 1.0 for name in weights if weights[name]}}}


@contextmanager
def deadline(seconds=5):
    """An endless loop becomes an error."""

    def stop(*_):
        raise TimeoutError("it does not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# -- the collator on a hand-made batch -------------------------------------------------------------------


def test_prompts_and_answers():
    batch = collate()
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 15)
    assert batch["attention_mask"].sum(-1).tolist() == [15, 7]
    assert batch["attention_mask"][1].tolist() == [1] * 7 + [0] * 8
    short = ["Sam", " is a impus.", "Tom", " is a rompus.", "Is Sam", " a impus", " or rompus?"]
    assert batch["input_ids"][1, :7].tolist() == [token(x) for x in short]
    eos = TOKENIZER.eos_token_id
    assert batch["answer_ids"].tolist() == [
        [token("Tom"), node("numpus"), eos],
        [token("Sam"), node("impus"), eos],
    ]
    assert batch["labels"].tolist() == batch["answer_ids"].tolist()
    assert batch["first"].tolist() == [token("Tom"), token("Sam")]
    assert batch["work"].tolist() == [3, 1]
    assert batch["exits"].tolist() == [4, 2]
    assert batch["plan"] == LoopPlan(4)


def test_targets_are_the_frontiers_and_then_the_answer():
    targets = collate()["targets"]
    assert targets.shape == (2, 4, 2)
    sets = [[set(row.tolist()) - {IGNORE} for row in example] for example in targets]
    assert sets[0] == [{node("rompus"), node("worpus")}, {node("lempus")}, {node("numpus")}, {token("Tom")}]
    assert sets[1] == [{node("impus")}, {token("Sam")}, {token("Sam")}, {token("Sam")}]
    assert (targets[0, 1] == IGNORE).sum() == 1


def test_fewer_iterations_than_hops_cut_the_targets():
    batch = collate(iterations=2)
    assert batch["targets"].shape == (2, 2, 2)
    assert set(batch["targets"][0, 1].tolist()) == {node("lempus"), IGNORE}
    assert batch["work"].tolist() == [3, 1]


def test_chains():
    batch = collate()
    assert batch["chain_starts"].tolist() == [
        [[token("Tom"), node("lempus")], [token("Sam")] * 2],
        [[token("Tom")] * 2, [token("Sam")] * 2],
    ]
    targets = batch["chain_targets"]
    assert targets.shape == (2, 2, 2, 3)
    assert targets[0, 0].tolist() == [
        [node("rompus"), node("worpus"), node("numpus")],
        [node("lempus"), IGNORE, IGNORE],
    ]
    assert targets[0, 1].tolist() == [[node("impus"), IGNORE, IGNORE], [IGNORE] * 3]
    assert targets[1, 0].tolist() == [[node("rompus"), IGNORE, IGNORE], [IGNORE] * 3]


def test_nothing_is_made_that_no_objective_asks_for():
    batch = collate(**terms())
    assert batch.keys() == {
        *("input_ids", "attention_mask", "answer_ids", "labels", "first", "work", "exits", "short", "plan")
    }
    assert "chain_starts" not in collate(chains=((), ()))


def test_no_iterations():
    with deadline():
        batch = collate(iterations=0)
    assert "targets" not in batch
    assert batch["work"].tolist() == [3, 1]


def test_chains_of_length_zero_end():
    # What a stage of no iterations asks for.
    rng = random.Random(0)
    chains = tuple(draw_chains(example, 2, 0, rng) for example in (HAND, SHORT))
    with deadline():
        collate(iterations=0, chains=chains)


def test_prefix_and_suffix_surround_the_question():
    text = {"prompt_prefix": "Every impus is a numpus. ", "prompt_suffix": "Tom is a impus."}
    plain, around = collate(), collate(text=text)
    assert around["attention_mask"].sum(-1).tolist() == [19, 11]
    first = around["input_ids"][1, :11].tolist()
    assert first[:2] == [token("Every impus"), node("numpus")]
    assert first[2:9] == plain["input_ids"][1, :7].tolist()
    assert first[9:] == [token("Tom"), node("impus")]


def test_an_answer_prefix_is_fed_and_not_asked_for():
    batch = collate(text={"answer_prefix": "Every impus"})
    plain = collate()
    assert batch["answer_ids"][:, 0].tolist() == [token("Every impus")] * 2
    assert batch["labels"][:, 0].tolist() == [IGNORE] * 2
    for name in ("answer_ids", "labels"):
        assert torch.equal(batch[name][:, 1:], plain[name])


def test_a_tokenizer_that_splits_nodes_is_refused():
    with pytest.raises(DataError, match="one token per mention"):
        collate(items(HAND), tokenizer=tiny.tokenizer())


def test_a_nested_list_is_padded_whatever_is_empty():
    assert pad([[], [[1, 2], [3]]]).tolist() == [[[IGNORE] * 2] * 2, [[1, 2], [3, IGNORE]]]
    assert pad([[], []]).shape == (2, 0)
    assert pad([[1], [2, 3]]).tolist() == [[1, IGNORE], [2, 3]]


# -- the chain in words ----------------------------------------------------------------------------------

WORDED = prosqa_tokenizer(chain_of_thought=True)
STEPS = ["Tom is a rompus.", "Every rompus is a lempus.", "Every lempus is a numpus."]


def written(batch, name="answer_ids", row=0):
    ids = [i for i in batch[name][row].tolist() if i != IGNORE]
    assert ids[-1] == WORDED.eos_token_id
    return WORDED.decode(ids[:-1])


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_steps_that_the_loop_does_not_stand_for_are_written(replaced):
    batch = collate(items(HAND, SHORT, replaced=replaced), tokenizer=WORDED)
    assert written(batch) == " ".join([*STEPS[replaced:], "#", HAND.answer])
    assert written(batch, row=1) == ("Sam is a impus. # Sam is a impus." if replaced == 0 else "Sam is a impus.")


@pytest.mark.parametrize("replaced", [3, 10**6])
def test_with_no_step_left_the_answer_stands_alone(replaced):
    assert written(collate(items(HAND, replaced=replaced), tokenizer=WORDED)) == HAND.answer


@pytest.mark.parametrize(("removed", "left"), [(0, 6), (1, 5), (4, 2), (6, 0), (99, 0)])
def test_tokens_can_leave_one_by_one(removed, left):
    batch = collate(items(HAND, removed=removed), tokenizer=WORDED)
    whole = WORDED(" ".join(STEPS)).input_ids
    after = [*WORDED("#").input_ids] if left else []
    expected = [*whole[6 - left :], *after, *WORDED(HAND.answer).input_ids, WORDED.eos_token_id]
    assert batch["answer_ids"][0].tolist() == expected


def test_a_tokenizer_without_the_separator_cannot_write_steps():
    """It would learn to write the unknown token, and no answer after it would be found."""
    assert collate(items(HAND))["answer_ids"].shape[0] == 1
    for changes in ({"replaced": 0}, {"removed": 1}):
        with pytest.raises(DataError, match="no token for `#`"):
            collate(items(HAND, **changes))
    with pytest.raises(DataError, match="no token for `#`"):
        collate(items(HAND), **terms(cot=True))


def test_steps_have_tokens_of_their_own():
    batch = collate(items(HAND, SHORT, replaced=2), tokenizer=WORDED, **terms(steps=True))
    assert batch["step_ids"].shape == (2, 3, 2)
    assert [WORDED.decode(step) for step in batch["step_ids"][0].tolist()] == STEPS
    assert batch["step_ids"][1, 1:].unique().tolist() == [IGNORE]
    assert batch["in_loop"].tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("term", ["cot", "cot_states", "codi"])
def test_a_chain_in_words_knows_where_its_steps_end(term):
    batch = collate(items(HAND, SHORT), tokenizer=WORDED, **terms(**{term: True}))
    assert written(batch, "cot_ids") == " ".join([*STEPS, "#", HAND.answer])
    assert batch["step_ends"].tolist() == [[1, 3, 5], [1, IGNORE, IGNORE]]
    assert batch["mark_at"].tolist() == [6, 2]
    assert WORDED.decode(batch["cot_ids"][1, 2]).strip() == "#"


def test_thoughts_per_step_count_as_work():
    assert collate(thoughts_per_step=2)["work"].tolist() == [6, 2]


# -- chains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_chains_start_at_parents_and_follow_the_edges(seed):
    example = next(generate_prosqa(GraphSpec(14, 1, 3, balanced=False), seed))
    symbols, edges = example.extra["idx_to_symbol"], example.extra["edges"]
    parents = {symbols[p] for p, _ in edges}
    chains = draw_chains(example, 5, 3, random.Random(seed))
    assert len(chains) == 5
    for start, levels in chains:
        assert 1 <= len(start) <= 2
        assert set(start) <= parents
        assert 1 <= len(levels) <= 3
        seen = set(start)
        frontier = set(start)
        for level in levels:
            frontier = {symbols[c] for p, c in edges if symbols[p] in frontier} - seen
            assert set(level) == frontier
            seen |= frontier
    lengths = {len(start) for start, _ in draw_chains(example, 60, 3, random.Random(seed))}
    assert lengths == {1, 2}


def test_options_of_a_graph_may_be_strings():
    """As a shell gives them; evaluation converts them too."""
    options = {"nodes": "16", "balanced": "false"}
    source = open_source(DataConfig(task="prosqa", generator_options=options), seed=0)
    assert source.spec == GraphSpec(nodes=16, balanced=False)


def test_training_puts_the_prompt_of_the_evaluation(tmp_path):
    file = tmp_path / "math.jsonl"
    file.write_text(json.dumps({"question": "What is 1+1?", "answer": "2"}))
    source = open_source(DataConfig(task="math", file=str(file)), seed=0)
    (example,) = source.draw(0, 1, random.Random(0))
    assert example.question == get_task("math").prompt(Example("What is 1+1?", (), "2")) != "What is 1+1?"


@pytest.mark.parametrize("text", ["\u4f60\u597d\u4e16\u754c" * 40, "word\n" * 60])
def test_text_without_spaces_is_cut_anywhere(tmp_path, text):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    for piece in open_source(DataConfig(text=str(file), characters=32), seed=0).draw(0, 20, random.Random(0)):
        assert piece.question
        assert piece.answer
        assert piece.question + piece.answer in text


def test_generated_batches_hold_like_lengths():
    """Little of a batch is padding, and over the steps every length is as frequent as the generator makes it."""
    source = open_source(DataConfig(task="word_problems"), seed=0)
    batches = [[len(example.question) for example in source.draw(0, 8, random.Random(seed))] for seed in range(40)]
    plain = [len(example.question) for example in islice(get_task("word_problems").generate(0), 320)]
    assert all(len(lengths) == 8 for lengths in batches)
    assert mean(map(pstdev, batches)) < 0.5 * pstdev(plain)
    assert mean(map(mean, batches)) == pytest.approx(mean(plain), rel=0.15)
