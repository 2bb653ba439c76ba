import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
import yaml

from slr_core.config import LoopConfig
from slr_core.errors import ConfigError
from slr_core.training.config import ObjectiveWeights, TrainConfig
from slr_core.training.stages import SampledIterations
from slr_core.validation import validated
from tests.training.recipe import DATA, GRAPHS, recipe

RECIPES = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_is_bounded(seed):
    with pytest.raises(ConfigError, match="seed"):
        recipe(seed=seed)


def test_no_stage_passes_an_end_that_is_an_error():
    loop = DATA["loop"] | {"lora": {"rank": 2, "past_end": "error"}, "trained_iterations": 3, "max_iterations": 3}
    with pytest.raises(ConfigError, match=r"stages\.iterations must be at most loop\.trained_iterations, 3, .* got 4"):
        recipe(loop=loop)
    recipe(loop=loop, max_iterations=3)


def test_a_value_that_yaml_reads_as_a_date_is_named(path):
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay"):
        TrainConfig.from_yaml(path, ("optimizer.weight_decay=2020-01-01",))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(DATA))
    return path


def test_a_recipe_is_read(path):
    config = TrainConfig.from_yaml(path)
    assert config == recipe() == TrainConfig.from_yaml(str(path))
    assert config.total_steps == 6
    assert config.stages[1].data[1].generator_options["max_hops"] == 3
    assert config.schedule == config.stages


@pytest.mark.parametrize("name", [path.name for path in sorted(RECIPES.glob("*.yaml"))])
def test_the_recipes_that_ship_are_valid(name):
    config = TrainConfig.from_yaml(RECIPES / name)
    assert config.total_steps == sum(stage.steps for stage in config.schedule)


def test_iterations_are_capped():
    def lengths(config):
        return [config.iterations(stage, random.Random(0)) for stage in config.stages]

    assert lengths(recipe(max_iterations=3)) == [2, 3]
    assert lengths(recipe(max_iterations=0)) == [0, 0]
    drawn = {"mean": 6, "least": 5, "most": 9}
    assert lengths(recipe(max_iterations=3, stages=[{**DATA["stages"][1], "iterations": drawn}])) == [3]


def test_a_drawn_loop_length_has_the_mean_that_was_asked_for():
    # The standard error of the mean of 20,000 draws is about 0.04.
    rng = random.Random(0)
    drawn = [SampledIterations(mean=9, sigma=0.5).draw(rng) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(9, abs=0.2)
    # 1 + Poisson of a log-normal rate: its variance is the rate's mean plus the rate's variance.
    assert statistics.pvariance(drawn) == pytest.approx(8 + 64 * (math.exp(0.25) - 1), rel=0.1)


def test_a_drawn_loop_length_is_clipped():
    rng = random.Random(0)
    drawn = Counter(SampledIterations(mean=6, sigma=1.5, least=4, most=8).draw(rng) for _ in range(2000))
    assert set(drawn) == {4, 5, 6, 7, 8}
    assert min(drawn[4], drawn[8]) > max(drawn[5], drawn[6], drawn[7])
    assert {SampledIterations(mean=64, sigma=0, most=64).draw(random.Random(i)) <= 64 for i in range(50)} == {True}


def test_a_drawn_loop_length_is_checked():
    with pytest.raises(ConfigError, match="least must be at most"):
        validated(SampledIterations, {"mean": 3, "least": 5, "most": 4})
    with pytest.raises(ConfigError, match="mean"):
        validated(SampledIterations, {"mean": 1})


CURRICULUM = {"data": GRAPHS, "stages": 2, "first_steps": 5, "stage_steps": 7, "last_steps": 9}


ADAPTERS = {"train": "adapters", "objectives": {"answer": 1.0}, "chains": 0}


def data(**source):
    return {"steps": 1, "iterations": 1, "data": [source]}


WRONG = {
    "unknown": ({"epochs": 3}, "epochs"),
    "nested-unknown": ({"optimizer": {"momentum": 1}}, "optimizer.momentum"),
    "no-stages": ({"stages": []}, "either stages or a curriculum"),
    "both": ({"curriculum": CURRICULUM}, "either stages or a curriculum"),
    "no-file": ({"stages": [data(task="prosqa", file=None)]}, "stages.0.data.0: file has no value"),
    "empty-split": ({"stages": [data(task="gsm8k", split="")]}, "stages.0.data.0: split has no value"),
    "near-task": ({"stages": [data(task="prosaq")]}, "did you mean prosqa?"),
    "near-option": (
        {"stages": [data(task="prosqa", generator_options={"node": 8})]},
        "no generator option node; it has nodes",
    ),
    "near-field": ({"optimiser": {}}, "optimiser: unknown field; did you mean optimizer?"),
    "near-nested": ({"optimizer": {"learning_rat": 1}}, "did you mean learning_rate?"),
    "near-alias": ({"base": {"form": "x"}}, "base.form: unknown field; did you mean from?"),
    "near-in-stage": (
        {"stages": [data(task="prosqa", fil="x")]},
        "stages.0.data.0.fil: unknown field; did you mean file?",
    ),
    "no-data": ({"stages": [{"steps": 1, "iterations": 1, "data": []}]}, "stages.0.data"),
    "steps": ({"stages": [{"steps": 0, "iterations": 1, "data": GRAPHS}]}, "stages.0.steps"),
    "iterations": ({"stages": [{"steps": 1, "iterations": 65, "data": GRAPHS}]}, "stages.0.iterations"),
    "generator_options": (
        {"stages": [data(task="prosqa", generator_options={"nodes": 8, "min_hops": 2, "max_hops": 9})]},
        "data.0: hops must satisfy",
    ),
    "no-option": ({"stages": [data(task="prosqa", generator_options={"sides": 8})]}, "has no generator option sides"),
    "task-unnamed": ({"stages": [data()]}, "name the task (--task; in a recipe: task): text, prosqa"),
    "no-task": ({"stages": [data(task="chess")]}, "there is no task chess"),
    "two-sources": (
        {"stages": [data(task="prosqa", file="a.jsonl", split="test")]},
        "give one of file, split and text",
    ),
    "options-of-a-file": (
        {"stages": [data(task="prosqa", file="a.jsonl", generator_options={"nodes": 8})]},
        "generator_options apply to generated questions only",
    ),
    "not-generated": ({"stages": [data(task="gsm8k")]}, "cannot generate"),
    "base-and-sizes": ({"base": {"from": "x", "hidden_size": 64}}, "remove hidden_size"),
    "adapters-of-nothing": ({"base": {"keep_adapters": True}}, "base.keep_adapters needs base.from"),
    "adapters-and-all": ({"base": {"from": "x", "keep_adapters": True}, "loop": None}, "base.keep_adapters needs loop"),
    "no-teacher": ({"objectives": {"teacher_states": 1}}, "need a teacher"),
    "no-graphs": ({"stages": [data(task="prontoqa")]}, "objectives.frontier and chains need graphs"),
    "nothing": ({"objectives": {"answer": 0}}, "at least one weight"),
    "heads": ({"base": {"hidden_size": 20, "num_attention_heads": 3}}, "hidden_size must be a multiple"),
    "rate": ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
    "rate-nan": ({"optimizer": {"learning_rate": float("nan")}}, ""),
    "batch": ({"optimizer": {"batch_size": 0}}, "optimizer.batch_size"),
    "weight": ({"objectives": {"answer": -1}}, "objectives.answer"),
    "loop": ({"loop": {"trained_iterations": 0}}, "loop.trained_iterations"),
    "seed": ({"seed": "x"}, "seed"),
    "text": ({"text": "x"}, "text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, path):
    changes, named = WRONG[case]
    path.write_text(yaml.safe_dump({**DATA, **changes}))
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(path)
    assert named in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "Value error" not in str(caught.value)


def test_only_own_faults(path):
    """A fault in an item of a list does not also make the list too short."""
    path.write_text(yaml.safe_dump({**DATA, "stages": [data(task="chess")]}))
    with pytest.raises(ConfigError, match=r"there is no task chess[^;]*; there are [^;]*$"):
        TrainConfig.from_yaml(path)


def test_a_missing_field_is_named(path):
    path.write_text(yaml.safe_dump({key: value for key, value in DATA.items() if key != "output_dir"}))
    with pytest.raises(ConfigError, match="output_dir"):
        TrainConfig.from_yaml(path)


@pytest.mark.parametrize(
    "content", [b"a: [", b"\xff\xfe\x00", b"", b"- 1\n- 2\n", b"word", b"a: !!python/object:os.x 1"]
)
def test_a_file_that_is_not_a_recipe_is_named(content, path):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        TrainConfig.from_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        TrainConfig.from_yaml(tmp_path / "nowhere.yaml")


NO_CHAINS = "objectives.chains must be 0 unless loop.workspace is `append`"
NO_STEPS = "objectives.steps must be 0 in the workspace `prompt`"
NO_START = "objectives.start must be 0 in the workspace `prompt`"
ONLY_ANSWER = {**dict.fromkeys(ObjectiveWeights.model_fields, 0), "answer": 1}
STEPS = {**dict.fromkeys(ObjectiveWeights.model_fields, 0), "answer": 1, "steps": 1}
SOFT = {"projection": {"kind": "expected_embedding"}}
CHAIN = {"supervised": "chain", "objectives": STEPS, "loop": SOFT, "text": {"answer_prefix": " #"}}
MISFITS = {
    "chains-block": ({"loop": {"workspace": "block"}}, NO_CHAINS),
    "chains-prompt": ({"loop": {"workspace": "prompt"}, "objectives": {"chains": 1}}, NO_CHAINS),
    "chains-noise": ({"loop": {"timestep": {"noise_level": True}}}, NO_CHAINS),
    "chains-pause": ({"loop": {"projection": {"kind": "pause"}}}, NO_CHAINS),
    "steps-prompt": ({"loop": {"workspace": "prompt"}, "objectives": {"steps": 1}}, NO_STEPS),
    "cot-prompt": ({"loop": {"workspace": "prompt"}, "objectives": {"codi": 1}}, "objectives.cot and codi must be 0"),
    "every-append": (
        {"supervised": "every", "objectives": STEPS},
        "supervised must not be `every` but in the workspace `block`",
    ),
    "chain-block": (
        {"supervised": "chain", "objectives": STEPS, "loop": {"workspace": "block"}},
        "supervised must not be `chain` but in the workspaces `block` with feedback `shifted`",
    ),
    "chain-without-steps": ({"supervised": "chain", "loop": SOFT}, "supervised `chain` needs objectives.steps or cot"),
    "chain-replaced": ({**CHAIN, "stages": [{**DATA["stages"][0], "replaced": 1}]}, "stages that replace all steps"),
    "chain-removed": ({**CHAIN, "stages": [{**DATA["stages"][0], "removed_tokens": 1}]}, "stages that replace all"),
    "chain-states": ({**CHAIN, "objectives": {**STEPS, "cot_states": 1}}, "objectives.cot_states and thoughts must be"),
    "chain-per-step": ({**CHAIN, "thoughts_per_step": 2}, "thoughts_per_step must be 1 with supervised `chain`"),
    "chain-prefix": ({**CHAIN, "text": {"answer_prefix": ""}}, "`append` needs text.answer_prefix"),
    "no-head": ({"objectives": {"halting": 1}}, "objectives.halting needs loop.halting_head"),
    "no-decoder": ({"objectives": {"thoughts": 1}}, "objectives.thoughts needs loop.decoder.latent_decoder"),
    "text-append": ({"objectives": {"text": 1}}, "objectives.text needs the workspace `prompt`"),
    "steps-token": (
        {"loop": {"workspace": "token"}, "objectives": {"chains": 0, "start": 0, "steps": 1}},
        "is not supported by workspace `token`",
    ),
    "shared-token": (
        {"loop": {"workspace": "token", "deeper_cache": "shared"}, "objectives": ONLY_ANSWER},
        "loop.deeper_cache must be `copy` in training",
    ),
    "words-and-loop": ({"chain_of_thought": True}, "max_iterations must be 0 with chain_of_thought"),
    "start-prompt": ({"loop": {"workspace": "prompt"}, "chains": 0}, NO_START),
}


@pytest.mark.parametrize("case", MISFITS)
def test_objectives_that_do_not_suit_the_loop_are_refused(case):
    changes, message = MISFITS[case]
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": {"workspace": "block"}, "chains": 0},
        {"loop": {"workspace": "block"}, "objectives": {"steps": 1, "cot": 1, "codi": 1}},
        {"loop": {"workspace": "prompt"}, "objectives": {"chains": 0, "start": 0}},
        {"loop": {"timestep": {"noise_level": True}}, "objectives": {"chains": 0}},
        {"loop": {"workspace": "prompt"}, "max_iterations": 0},
        {"loop": {"lora": {"kind": "shared", "covers": "all"}}, "max_iterations": 0, "train": "adapters"},
        {"loop": {"workspace": "token"}, "objectives": {**ONLY_ANSWER, "text": 1}},
        {"loop": {"workspace": "append"}, "max_iterations": 0, "chain_of_thought": True},
    ],
    ids=str,
)
def test_objectives_that_suit_the_loop_are_taken(changes):
    config = recipe(**changes)
    assert config.loop == validated(LoopConfig, changes["loop"])


def test_shortened():
    assert [stage.steps for stage in recipe().shortened(3).schedule] == [2, 1]
    assert recipe().shortened(2).total_steps == 2
    assert recipe().shortened(100).schedule == recipe().schedule
    short = recipe(curriculum=CURRICULUM, stages=[], objectives={"answer": 1.0}, chains=0).shortened(1)
    assert (short.total_steps, short.schedule[0].replaced) == (1, 0)


# -- the curriculum ----------------------------------------------------------------------------------------


def curriculum(thoughts_per_step=1, **changes):
    config = recipe(curriculum={**CURRICULUM, **changes}, stages=[], thoughts_per_step=thoughts_per_step)
    return config, [(stage.replaced, stage.iterations, stage.steps) for stage in config.schedule]


def test_a_curriculum_is_written_out_as_stages():
    config, stages = curriculum()
    assert stages == [(0, 0, 5), (1, 1, 7), (2, 2, 7), ("all", 2, 9)]
    assert config.total_steps == 28
    assert {stage.exit for stage in config.schedule} == {"last"}
    assert config.writes_steps
    assert {stage.exit for stage in curriculum(pad=False)[0].schedule} == {"own"}


def test_a_base_that_writes_the_chain_needs_no_first_stage():
    assert curriculum(first_steps=0)[1] == curriculum()[1][1:]
    recipe(curriculum={**CURRICULUM, "first_steps": 0}, stages=[], **ADAPTERS)
    for changes in ({"curriculum": CURRICULUM, "stages": []}, {"stages": [{**data(task="prosqa"), "iterations": 0}]}):
        with pytest.raises(ConfigError, match="0 iterations nothing to train"):
            recipe(**changes, **ADAPTERS)


def test_thoughts_are_added_one_at_a_time():
    assert curriculum(2)[1] == [(0, 0, 5), (1, 1, 3), (1, 2, 4), (2, 3, 3), (2, 4, 4), ("all", 4, 9)]
    assert curriculum(2, gradual=False)[1] == [(0, 0, 5), (1, 2, 7), (2, 4, 7), ("all", 4, 9)]


def test_tokens_leave_in_place_of_steps():
    config, _ = curriculum(tokens_per_stage=3)
    assert [stage.removed_tokens for stage in config.schedule] == [0, 3, 6, None]


def test_stages_are_mixed_and_the_optimizer_reset_where_asked_for():
    config, _ = curriculum(2, mix=0.3, reset_optimizer=True)
    assert [stage.mix for stage in config.schedule] == [0.0] + [0.3] * 5
    assert [stage.reset_optimizer for stage in config.schedule] == [False, True, False, True, False, True]


# -- overrides -------------------------------------------------------------------------------------------


def test_overrides_reach_nested_fields(path):
    overrides = ("seed=7", "optimizer.learning_rate=0.5", "max_iterations=0", "loop.lora.rank=3", "output_dir=a=b")
    config = TrainConfig.from_yaml(path, overrides)
    assert config.seed == 7
    assert config.optimizer.learning_rate == 0.5
    assert config.max_iterations == 0
    assert config.loop.lora.rank == 3
    assert config.output_dir == "a=b"
    assert config.optimizer.batch_size == 4
    assert TrainConfig.from_yaml(path, ("optimizer.learning_rate=1e-3",)).optimizer.learning_rate == 0.001


def test_overrides_reach_list_items(path):
    overrides = (
        "stages.0.steps=20",
        "stages.1.data.0.generator_options.nodes=7",
        "stages.1.data.1={task: reachability}",
    )
    overrides += ("objectives.frontier=0", "objectives.chains=0")
    first, second = TrainConfig.from_yaml(path, overrides).stages
    assert (first.steps, second.steps) == (20, 4)
    assert second.data[0].generator_options["nodes"] == 7
    assert second.data[1].task == "reachability"


def test_overrides_are_yaml_and_may_open_a_new_group(path):
    overrides = ("objectives.chains=0", "loop.lora.target_modules=[q_proj, v_proj]", "max_iterations=null")
    config = TrainConfig.from_yaml(path, overrides)
    assert config.objectives.chains == 0
    assert config.objectives.answer == 1.0
    assert config.loop.lora.target_modules == ("q_proj", "v_proj")
    assert config.max_iterations is None


def test_the_last_override_wins(path):
    assert TrainConfig.from_yaml(path, ("seed=1", "seed=2")).seed == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed", "--set seed"),
        ("seed.x=1", "seed"),
        ("stages.steps=3", "stages is a list, its indices are 0 to 1; got steps"),
        ("stages.2.steps=3", "stages is a list, its indices are 0 to 1; got 2"),
        ("stages.-1.steps=3", "stages is a list, its indices are 0 to 1; got -1"),
        ("stages.0.data.1.task=prosqa", "stages.0.data is a list, its only index is 0; got 1"),
        ("stages.0.data.1=prosqa", "stages.0.data is a list, its only index is 0; got 1"),
        ("stages.0.stepz=3", "stages.0.stepz: unknown field; did you mean steps?"),
        ("stages.0.steps.x=3", "stages.0.steps is not a group of settings"),
        ("optimizer.batchsize=3", "optimizer.batchsize: unknown field; did you mean batch_size?"),
        ("nonesuch=1", "nonesuch"),
        ("loop.lora.nonesuch=1", "loop.lora.nonesuch"),
        ("seed=x", "seed"),
        ("=1", "unknown field"),
        ("", "--set"),
        ("seed=[1", "seed"),
        ("seed={", "seed"),
    ],
)
def test_a_wrong_override_is_named(override, named, path):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(path, (override,))
    assert named in str(caught.value)


BASES = {
    "random": {"hidden_size": 64},
    "from": {"from": "x"},
    "adapters": {"from": "x", "keep_adapters": True},
    "pruned": {"from": "x", "num_attention_heads": 2, "intermediate_size": 96},
}


@pytest.mark.parametrize("name", BASES)
def test_a_written_recipe_can_be_read_again(name):
    made = recipe(base=BASES[name])
    written = made.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert validated(TrainConfig, json.loads(json.dumps(written))) == made
