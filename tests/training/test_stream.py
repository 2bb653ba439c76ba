import itertools
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from slr_core.errors import ConfigError
from slr_core.tasks.prosqa import frontiers
from slr_core.training.data import IGNORE, Share, StageStream
from tests.training.recipe import GRAPHS, recipe
from tests.training.test_data import collate, node

# On one core torch warns of a second loader process.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def batches(config, workers=0, first_step=0, share=None):
    loader = DataLoader(StageStream(config, first_step, share), batch_size=None, num_workers=workers, collate_fn=list)
    return list(loader)


def stage(**changes):
    return {"steps": 6, "data": GRAPHS, "iterations": 4, **changes}


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


@pytest.mark.parametrize("passes", [1, 2])
def test_processes_share_a_batch_among_them(passes):
    config = recipe()
    parts = [batches(config, share=Share(process, 2, passes)) for process in (0, 1)]
    for step, whole in enumerate(batches(config)):
        dealt = [part[step * passes + i] for part in parts for i in range(passes)]
        assert [len(part) for part in dealt] == [4 // (2 * passes)] * (2 * passes)
        together = [item.example.question for part in dealt for item in part]
        assert sorted(together) == sorted(item.example.question for item in whole)


def test_loop_lengths_per_batch():
    drawn = stage(steps=40, iterations={"mean": 4, "least": 2, "most": 6}, backprop=3)
    steps = batches(recipe(stages=[drawn], chain_spread=2, chain_length=9))
    assert all(len({item.plan for item in step}) == 1 for step in steps)
    plans = [step[0].plan for step in steps]
    assert {plan.iterations for plan in plans} == {2, 3, 4, 5, 6}
    assert {plan.chains_after for plan in plans} == {0, 1, 2}
    assert {plan.backprop for plan in plans} == {3}
    for step, plan in zip(steps, plans, strict=True):
        assert all(1 <= item.short < plan.iterations for item in step)


def test_late_exit_range():
    drawn = [item for step in batches(recipe(stages=[stage(steps=150, iterations=6)])) for item in step]
    after = {work: Counter(i.exit_after(work) for i in drawn if len(i.example.steps) == work) for work in (1, 2, 3)}
    for work, exits in after.items():
        assert set(exits) == set(range(work + 1, 7))
        assert max(exits.values()) < 3 * min(exits.values())
    short = [item for step in batches(recipe(stages=[stage(iterations=2)])) for item in step]
    assert {item.exit_after(len(item.example.steps)) for item in short} == {2}


def test_other_exits_are_the_questions_own_or_the_last():
    own = [item for step in batches(recipe(stages=[stage(exit="own")])) for item in step]
    assert {(work, i.exit_after(work)) for i in own for work in (2, 4, 6)} == {(2, 2), (4, 4), (6, 4)}
    last = [item for step in batches(recipe(stages=[stage(exit="last")])) for item in step]
    assert {item.exit_after(work) for item in last for work in (1, 4, 6)} == {4}


def test_a_share_of_questions_is_put_as_in_an_earlier_stage():
    stages = [stage(steps=1, replaced=0), stage(steps=1, replaced=1), stage(steps=50, replaced=2, mix=0.6)]
    drawn = [item.replaced for step in batches(recipe(stages=stages), first_step=2) for item in step]
    # A mixed one comes from any of the three: 0.2 of all from each.
    for replaced, share in ((0, 0.2), (1, 0.2), (2, 0.6)):
        assert drawn.count(replaced) / len(drawn) == pytest.approx(share, abs=0.1)
    assert {item.replaced for step in batches(recipe(stages=stages))[:2] for item in step} == {0, 1}


def test_a_chain_of_thought_in_words_replaces_nothing():
    config = recipe(max_iterations=0, chain_of_thought=True)
    assert {item.replaced for step in batches(config) for item in step} == {0}


def test_the_seed_makes_the_data_and_every_step_is_new():
    assert batches(recipe()) == batches(recipe())
    assert batches(recipe()) != batches(recipe(seed=4))
    questions = [item.example.question for step in batches(recipe()) for item in step]
    assert len(set(questions)) > 0.9 * len(questions)


def test_the_cap_on_iterations_changes_no_example():
    def examples(config):
        return [item.example for step in batches(config) for item in step]

    control = recipe(max_iterations=0)
    assert examples(control) == examples(recipe())
    assert {item.plan.iterations for step in batches(control) for item in step} == {0}


def test_a_generated_batch_holds_its_frontiers():
    made = next(itertools.islice(StageStream(recipe()), 2, None))
    batch = collate(made)
    for row, item in enumerate(made):
        levels = frontiers(item.example)[1:]
        for t, level in enumerate(levels[:4]):
            found = batch["targets"][row, t]
            assert set(found[found != IGNORE].tolist()) == {node(word) for word in level}
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.long


def test_generated_questions_repeat():
    """A source of so many questions has no others, and another seed has others."""
    data = [{"task": "prosqa", "generator_options": {"nodes": 6, "min_hops": 1, "max_hops": 2}, "questions": 5}]
    asked = [
        {item.example.question for step in batches(recipe(stages=[stage(data=data)], seed=seed)) for item in step}
        for seed in (0, 0, 1)
    ]
    assert len(asked[0]) == 5
    assert asked[0] == asked[1]
    assert not asked[0] & asked[2]


@pytest.mark.parametrize("more", [{}, {"questions": 5}])
def test_steps_are_written_as_text(more):
    data = {"task": "p_hop", "generator_options": {"letters": 3, "length": 9, "max_hops": 2}} | more
    objectives = {"answer": 1.0, "text": 1.0}
    loop = {"workspace": "token"}
    whole, written = (
        [
            item.example
            for step in batches(recipe(stages=[stage(data=[source])], loop=loop, objectives=objectives))
            for item in step
        ]
        for source in (data, data | {"write_steps": True})
    )
    assert {(f"{x.question} {' '.join(x.steps)}", (), x.answer) for x in whole} == {
        (x.question, x.steps, x.answer) for x in written
    }
    with pytest.raises(ConfigError, match="write_steps"):
        recipe(stages=[stage(data=[{"text": "file.txt", "write_steps": True}])], objectives={"answer": 1.0}, chains=0)
    with pytest.raises(ConfigError, match="need graphs"):
        recipe(stages=[stage(data=[{"task": "prosqa", "write_steps": True}])])


def test_stage_without_objectives():
    stages = [stage(steps=1), stage(steps=1, without=["frontier", "chains"])]
    assert [step[0].plan.without for step in batches(recipe(stages=stages))] == [(), ("frontier", "chains")]
    for without in ("frontiers", "codi"):
        with pytest.raises(ConfigError, match=f"{without} is not an objective"):
            recipe(stages=[stage(without=[without])])
    with pytest.raises(ConfigError, match="no objective"):
        recipe(stages=[stage(without=["answer"])], objectives={"answer": 1.0})
