import itertools
import random
import signal
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader

from slr_core.errors import DataError
from slr_core.tasks.base import Example
from slr_core.tasks.prosqa import GraphSpec, frontiers, generate
from slr_core.training.data import IGNORE, Collator, Item, LoopPlan, StageStream, draw_chains
from slr_core.training.tokenizer import prosqa_tokenizer
from tests import tiny
from tests.training.recipe import GRAPHS, recipe

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


def collate(iterations=4, chains=CHAINS, prefix="", suffix=""):
    collator = Collator(TOKENIZER, prefix, suffix)
    plan = LoopPlan(iterations)
    return collator([Item(HAND, plan, chains[0]), Item(SHORT, plan, chains[1])])


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
    assert batch["hops"].tolist() == [3, 1]
    assert batch["plan"] == LoopPlan(4)


def test_targets_are_the_frontiers_and_then_the_answer():
    targets = collate()["targets"]
    assert targets.shape == (2, 4, 2)
    sets = [[set(row.tolist()) - {IGNORE} for row in example] for example in targets]
    assert sets[0] == [{node("rompus"), node("worpus")}, {node("lempus")}, {node("numpus")}, {token("Tom")}]
    assert sets[1] == [{node("impus")}, {token("Sam")}, {token("Sam")}, {token("Sam")}]
    assert (targets[0, 1] == IGNORE).sum() == 1


@pytest.mark.parametrize(("late", "after"), [(0.0, 4), (0.49, 5), (0.5, 6), (0.999, 7)])
def test_an_answer_is_written_between_the_end_of_the_work_and_the_last_iteration(late, after):
    items = [Item(example, LoopPlan(t), (), late) for example, t in ((HAND, 7), (SHORT, 7))]
    assert Collator(TOKENIZER, "", "")(items)["exits"].tolist() == [after, 2 + int(late * 6)]
    short = Collator(TOKENIZER, "", "")([Item(HAND, LoopPlan(2), (), late)])
    assert short["exits"].tolist() == [2]


def test_fewer_iterations_than_hops_cut_the_targets():
    batch = collate(iterations=2)
    assert batch["targets"].shape == (2, 2, 2)
    assert set(batch["targets"][0, 1].tolist()) == {node("lempus"), IGNORE}
    assert batch["hops"].tolist() == [3, 1]


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


def test_no_chains():
    batch = collate(chains=((), ()))
    assert batch["chain_starts"] is batch["chain_targets"] is None


def test_no_iterations():
    with deadline():
        batch = collate(iterations=0)
    assert batch["targets"] is None
    assert batch["hops"].tolist() == [3, 1]


def test_chains_of_length_zero_end():
    # What a stage of no iterations asks for.
    rng = random.Random(0)
    chains = tuple(draw_chains(example, 2, 0, rng) for example in (HAND, SHORT))
    with deadline():
        collate(iterations=0, chains=chains)


def test_prefix_and_suffix_surround_the_question():
    plain, around = collate(), collate(prefix="Every impus is a numpus. ", suffix="Tom is a impus.")
    assert around["attention_mask"].sum(-1).tolist() == [19, 11]
    first = around["input_ids"][1, :11].tolist()
    assert first[:2] == [token("Every impus"), node("numpus")]
    assert first[2:9] == plain["input_ids"][1, :7].tolist()
    assert first[9:] == [token("Tom"), node("impus")]


def test_a_tokenizer_that_splits_nodes_is_refused():
    with pytest.raises(DataError, match="one token per mention"):
        Collator(tiny.tokenizer(), "", "")([Item(HAND, LoopPlan(2), ())])


# -- chains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_chains_start_at_parents_and_follow_the_edges(seed):
    example = next(generate(GraphSpec(14, 1, 3), seed))
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


# -- the stream ------------------------------------------------------------------------------------------


# On one core torch warns of a second loader process.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def batches(config, workers=0, first_step=0):
    loader = DataLoader(
        StageStream(config, first_step),
        batch_size=config.optimizer.batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    return list(loader)


def test_the_stages_come_in_order():
    config = recipe()
    steps = batches(config)
    assert len(steps) == 6
    assert [{item.plan.iterations for item in step} for step in steps] == [{2}] * 2 + [{4}] * 4
    assert all(len(step) == 4 for step in steps)
    assert all(len(item.chains) == 2 for step in steps for item in step)
    for step in steps[:2]:
        assert all(1 <= len(item.example.steps) <= 2 for item in step)
        assert all(len(item.example.extra["idx_to_symbol"]) <= 6 for item in step)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_do_not_change_the_data(workers):
    config = recipe()
    assert batches(config, workers) == batches(config)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first_step", [1, 2, 5, 6])
def test_a_stream_that_starts_late_is_the_tail_of_the_whole(first_step, workers):
    config = recipe(chain_spread=3)
    assert batches(config, workers, first_step) == batches(config)[first_step:]


def test_loop_lengths_and_first_iterations_of_chains_are_drawn_per_batch():
    stage = {"steps": 40, "iterations": {"mean": 4, "least": 2, "most": 6}, "backprop": 3, "graphs": GRAPHS}
    steps = batches(recipe(stages=[stage], chain_spread=2, chain_length=9))
    assert all(len({item.plan for item in step}) == 1 for step in steps)
    plans = [step[0].plan for step in steps]
    assert {plan.iterations for plan in plans} == {2, 3, 4, 5, 6}
    assert {plan.chains_after for plan in plans} == {0, 1, 2}
    assert {plan.backprop for plan in plans} == {3}


def test_the_seed_makes_the_data_and_every_step_is_new():
    assert list(StageStream(recipe())) == list(StageStream(recipe()))
    assert list(StageStream(recipe())) != list(StageStream(recipe(seed=4)))
    questions = [item.example.question for item in StageStream(recipe())]
    assert len(set(questions)) > 0.9 * len(questions)


def test_the_cap_on_iterations_changes_no_example():
    def examples(config):
        return [item.example for item in StageStream(config)]

    assert examples(recipe(max_iterations=0)) == examples(recipe())
    assert {item.plan.iterations for item in StageStream(recipe(max_iterations=0))} == {0}


def test_a_stage_without_iterations_can_be_collated():
    config = recipe(stages=[{"steps": 1, "iterations": 0, "graphs": [{"nodes": 8, "min_hops": 1, "max_hops": 2}]}])
    items = list(StageStream(config))
    with deadline():
        batch = Collator(TOKENIZER, "", "")(items)
    assert batch["plan"].iterations == 0


def test_a_generated_batch_holds_its_frontiers():
    items = list(itertools.islice(StageStream(recipe()), 8, 12))
    batch = Collator(TOKENIZER, "", "")(items)
    for row, item in enumerate(items):
        levels = frontiers(item.example)[1:]
        for t, level in enumerate(levels[:4]):
            found = batch["targets"][row, t]
            assert set(found[found != IGNORE].tolist()) == {node(word) for word in level}
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.long


def test_a_chain_of_thought_is_written_before_the_answer():
    tokenizer = prosqa_tokenizer(chain_of_thought=True)
    batch = Collator(tokenizer, "", "", chain_of_thought=True)([Item(HAND, LoopPlan(0), ())])
    (written,) = batch["answer_ids"].tolist()
    assert written[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(written[:-1]) == " ".join([*HAND.steps, "#", HAND.answer])
