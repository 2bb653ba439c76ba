import math
import random
import statistics
from collections import Counter

import pytest
import yaml

from slr_core.config import LoopConfig, validated
from slr_core.errors import ConfigError
from slr_core.training.config import SampledIterations, TrainConfig
from tests.training.recipe import DATA, GRAPHS, recipe


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(DATA))
    return path


def test_a_recipe_is_read(path):
    config = TrainConfig.from_yaml(path)
    assert config == recipe() == TrainConfig.from_yaml(str(path))
    assert config.total_steps == 6
    assert config.stages[1].graphs[1].spec().max_hops == 3
    assert config.stages[0].graphs[0].spec().balanced is True


def test_the_recipe_that_ships_is_valid(request):
    path = request.config.rootpath / "configs" / "prosqa.yaml"
    config = TrainConfig.from_yaml(path)
    assert config.total_steps == sum(stage.steps for stage in config.stages)
    assert all(config.iterations(stage, random.Random(0)) == stage.iterations for stage in config.stages)


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


WRONG = {
    "unknown": ({"epochs": 3}, "epochs"),
    "nested-unknown": ({"optimizer": {"momentum": 1}}, "optimizer.momentum"),
    "no-stages": ({"stages": []}, "stages"),
    "no-graphs": ({"stages": [{"steps": 1, "iterations": 1, "graphs": []}]}, "stages.0.graphs"),
    "steps": ({"stages": [{"steps": 0, "iterations": 1, "graphs": GRAPHS}]}, "stages.0.steps"),
    "iterations": ({"stages": [{"steps": 1, "iterations": 65, "graphs": GRAPHS}]}, "stages.0.iterations"),
    "graph": ({"stages": [{"steps": 1, "iterations": 1, "graphs": [{**GRAPHS[0], "max_hops": 9}]}]}, "graphs.0"),
    "graph-field": ({"stages": [{"steps": 1, "iterations": 1, "graphs": [{"nodes": 8}]}]}, "graphs.0.min_hops"),
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
NO_START = "objectives.start must be 0 in the workspace `prompt`"
MISFITS = {
    "chains-block": ({"loop": {"workspace": "block"}}, NO_CHAINS),
    "chains-prompt": ({"loop": {"workspace": "prompt"}, "objectives": {"start": 0}}, NO_CHAINS),
    "chains-noise": ({"loop": {"timestep": {"noise_level": True}}}, NO_CHAINS),
    "chains-pause": ({"loop": {"projection": {"kind": "pause"}}}, NO_CHAINS),
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
        {"loop": {"workspace": "block"}, "objectives": {"chains": 0}},
        {"loop": {"workspace": "prompt"}, "objectives": {"chains": 0, "start": 0}},
        {"loop": {"timestep": {"noise_level": True}}, "objectives": {"chains": 0}},
        {"loop": {"workspace": "prompt"}, "max_iterations": 0},
        {"loop": {"workspace": "append"}, "max_iterations": 0, "chain_of_thought": True},
    ],
    ids=str,
)
def test_objectives_that_suit_the_loop_are_taken(changes):
    config = recipe(**changes)
    assert config.loop == validated(LoopConfig, changes["loop"])


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
        ("stages.0.steps=3", "stages"),
        ("nonesuch=1", "nonesuch"),
        ("loop.lora.nonesuch=1", "loop.lora.nonesuch"),
        ("seed=x", "seed"),
        ("=1", "Extra inputs"),
        ("", "--set"),
        ("seed=[1", "seed"),
        ("seed={", "seed"),
    ],
)
def test_a_wrong_override_is_named(override, named, path):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(path, (override,))
    assert named in str(caught.value)
