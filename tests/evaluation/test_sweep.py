import json
import shutil
from itertools import islice

import pytest
import yaml
from typer.testing import CliRunner

from slr_core import cli
from slr_core.checkpoint.folder import BUNDLED_FOLDER
from slr_core.engine.runner.device import load_reasoner
from slr_core.errors import ConfigError, DataError
from slr_core.evaluation import sweep
from slr_core.evaluation.store import Store
from slr_core.evaluation.sweep_config import SweepConfig
from slr_core.tasks import get_task
from tests import tiny
from tests.training.recipe import DATA

JUDGE = {
    "task": "prosqa",
    "generate": 4,
    "generator_options": {"nodes": 6, "min_hops": 1, "max_hops": 2, "balanced": True},
    "methods": ["slr", "no_cot"],
}


@pytest.fixture
def spec(tmp_path):
    """A spec beside its recipe; returns a function that writes it with changes."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(DATA))

    def write(**changes):
        settings = {
            "recipe": "recipe.yaml",
            "output_dir": str(tmp_path / "out"),
            "set": {"stages": DATA["stages"][:1], "threads": 1},
            "vary": {"loop.residual.source": ["none", "previous"]},
            "seeds": [0, 1],
            "evaluate": [JUDGE],
        }
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


def write_questions(path, seed):
    examples = islice(get_task("prosqa").generate(seed, **JUDGE["generator_options"]), 4)
    path.write_text("".join(json.dumps(example.to_json()) + "\n" for example in examples))


@pytest.fixture
def trained(monkeypatch):
    """The recipes that were trained, in order."""
    done = []
    real = sweep.train

    def train(config, **options):
        done.append(config)
        return real(config, **options)

    monkeypatch.setattr(sweep, "train", train)
    return done


REVERSED = {"patience": 1, "threshold": 1.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vary": {"seed": [1, 2]}}, "vary: seed is set for every model; give seeds"),
        ({"set": {"seed": 7}}, "set: seed is set"),
        ({"variants": {"a": {"output_dir": "x"}}}, "a: output_dir is set"),
        (
            {"variants": {"a": {"loop.residual.source": "none"}}},
            r"variants\.a: loop\.residual\.source would be",
        ),
        ({"vary": {"loop.lora.rank": []}}, r"vary\.loop\.lora\.rank"),
        ({"evaluate": [JUDGE | {"loop": {"max_iteration": 3}}]}, r"loop\.max_iteration: unknown .* max_iterations"),
        (
            {"evaluate": [JUDGE | {"loop": {"max_iterations": "3"}}]},
            r"loop\.max_iterations must be .* got 3",
        ),
        ({"evaluate": [JUDGE | {"loop": {"max_iterations": 2.5}}]}, r"loop\.max_iterations must be a whole number"),
        ({"evaluate": [JUDGE | {"loop": {"patience": True}}]}, r"loop\.patience must be a whole number, got True"),
        ({"evaluate": [JUDGE | {"loop": {"noise_scale": "x"}}]}, r"loop\.noise_scale must be a number, got x"),
        ({"evaluate": [JUDGE | {"loop": {"criterion": ["kl"]}}]}, r"loop\.criterion must be one of"),
        ({"evaluate": [JUDGE | {"loop": {"max_iterations": -1}}]}, "max_iterations must be at least 0"),
        ({"evaluate": [JUDGE | {"iterations": [-1]}]}, r"iterations\.0"),
        ({"seeds": [0, 1, 0]}, r"seeds\.2: 0 is given twice"),
        ({"seeds": [-1]}, r"seeds\.0"),
        ({"vary": {"chains": [1, 2, 1]}}, r"vary\.chains\.2: 1 is given twice"),
        ({"evaluate": [JUDGE | {"methods": ["slr", "slr"]}]}, r"methods\.1: slr is given twice"),
        ({"evaluate": [JUDGE | {"iterations": [2, 2]}]}, r"iterations\.1: 2 is given twice"),
        ({"evaluate": [JUDGE, JUDGE | {"name": "b", "methods": ["slr"]}]}, "asked 2 times with the method slr"),
        (
            {"vary": {"loop.residual": [{"source": "none"}]}, "variants": {"a": {"loop.residual.source": "previous"}}},
            r"variants\.a: loop\.residual\.source would be replaced by vary, which has loop\.residual$",
        ),
        ({"vary": {"loop.residual": [{}]}, "set": {"loop.residual.norm": True}}, r"set: loop\.residual\.norm would be"),
        ({"vary": {"optimizer.weight_decay": [0, 0.0]}}, r"vary\.optimizer\.weight_decay\.1: 0\.0 is given twice"),
        (
            {"evaluate": [JUDGE | {"loop": loop} for loop in ({"threshold": 1, "patience": 1}, REVERSED)]},
            "asked 2 times",
        ),
        (
            {"variants": {"a": {}, "b": {"chains": 2}}, "evaluate": [JUDGE | {"variants": ["a"]}]},
            "no entry names b, which would answer no question",
        ),
        ({"set": {"chains=1": 1}}, "set: expected dotted names of settings, got chains=1"),
        (
            {"vary": {}, "variants": {"a": {}, "b": {"loop.residual.alpha": 7}}},
            r"spec\.yaml: b, seed=0: .*recipe\.yaml: loop\.residual\.alpha: ",
        ),
        ({"evaluate": [JUDGE, JUDGE | {"task": "prosqq"}]}, r"spec\.yaml: evaluate\.1: .*prosqq"),
        ({"evaluate": [{"task": "prosqa", "data": "x.jsonl"}]}, r"spec\.yaml: evaluate\.0: .*x\.jsonl"),
        ({"set": {"base": {"from": "./nowhere"}}}, r"base\.from: \./nowhere: no such file or folder"),
        ({"set": {"teacher": "./nowhere"}}, r"teacher: \./nowhere: no such file or folder"),
        ({"set": {"stages.0.data": [{"task": "prosqa", "file": "./no.jsonl"}]}}, r"\./no\.jsonl: no such file"),
    ],
)
def test_contradictions_are_told_before_any_training(spec, trained, changes, told):
    with pytest.raises((ConfigError, DataError), match=told):
        sweep.run_sweep(spec(**changes))
    assert trained == []


@pytest.mark.parametrize("place", ["set", "vary", "variants"])
def test_no_group_hides_a_setting_before_it(place, tmp_path):
    hidden, group = ("loop.lora.rank", 4), ("loop.lora", {"kind": "shared"})
    for settings, is_refused in (([hidden, group], True), ([group, hidden], False)):
        given = {name: [value] if place == "vary" else value for name, value in settings}
        spec = {"recipe": "r", "output_dir": "o", "evaluate": [JUDGE]}
        spec[place] = {"a": given} if place == "variants" else given
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        if is_refused:
            with pytest.raises(
                ConfigError, match=r"loop\.lora\.rank would be replaced by loop\.lora, which follows it"
            ):
                SweepConfig.from_yaml(tmp_path / "spec.yaml")
        else:
            SweepConfig.from_yaml(tmp_path / "spec.yaml")


def test_a_model_of_the_hub_is_known_by_its_id(finished, tmp_path, monkeypatch):
    """Under the same name in the spec, another id is another model."""
    monkeypatch.setattr(sweep, "load_reasoner", lambda path, **options: load_reasoner("prosqa"))
    for hub_id in ("me/x", "me/y"):
        sweep.run_sweep(finished({"a": hub_id}, [JUDGE | {"methods": ["slr"]}]))
    runs = Store(tmp_path / "results.jsonl").runs.values()
    assert [run.spec["model"] for run in runs] == [{"name": "a", "id": "me/x"}, {"name": "a", "id": "me/y"}]


def test_names_of_folders(tmp_path):
    """The order of settings is no difference, and a name in a wide script fits."""
    settings = {"loop.lora.rank": 4, "chains": 1.0}
    assert sweep._slug({}, settings) == sweep._slug({}, {"chains": 1, "loop.lora.rank": 4})
    assert sweep._slug({}, settings) != sweep._slug({}, {"chains": True, "loop.lora.rank": 4})
    (tmp_path / sweep._slug({"variant": "中" * 200}, settings)).mkdir()


@pytest.mark.slow
def test_every_combination(spec, trained, tmp_path):
    rows = sweep.run_sweep(spec())
    assert [(c.loop.residual.source, c.seed) for c in trained] == [
        ("none", 0),
        ("previous", 0),
        ("none", 1),
        ("previous", 1),
    ]
    assert [(row.variant.values["loop.residual.source"], row.variant.seed, row.method) for row in rows] == [
        (source, seed, method) for seed in (0, 1) for source in ("none", "previous") for method in ("slr", "no_cot")
    ]
    runs = Store(tmp_path / "out" / "results.jsonl").runs.values()
    assert len(runs) == 8
    assert all(len(run.outcomes) == 4 for run in runs)
    assert {run.spec["model"]["name"] for run in runs} == {row.variant.name for row in rows}
    assert len({run.spec["model"]["sha256"] for run in runs}) == 4


@pytest.mark.slow
def test_a_second_start_does_what_is_left(spec, trained, tmp_path):
    first = sweep.run_sweep(spec(seeds=[0]))
    results = tmp_path / "out" / "results.jsonl"
    before = results.read_bytes()
    models = sorted((tmp_path / "out" / "models").iterdir())
    shutil.rmtree(models[0])
    trained.clear()
    again = sweep.run_sweep(spec(seeds=[0]))
    assert len(trained) == 1
    assert trained[0].output_dir == str(models[0])
    # The same weights come out, so nothing is answered twice.
    assert results.read_bytes() == before
    assert [row.summary for row in again] == [row.summary for row in first]


@pytest.mark.parametrize("finished_only", [True, False])
def test_a_finished_model_of_another_recipe_is_not_compared(finished_only, spec, trained, tmp_path):
    path = spec(seeds=[0])
    sweep.run_sweep(path)
    trained.clear()
    (model, *_) = sorted((tmp_path / "out" / "models").iterdir())
    manifest = json.loads((model / "training.json").read_text())
    manifest["recipe"]["optimizer"]["batch_size"] = 8  # the recipe's file was edited
    (model / "training.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"is trained already: optimizer\.batch_size was 8 .* is \d now"):
        sweep.run_sweep(path, finished_only=finished_only)
    assert not trained


@pytest.mark.parametrize("changed", ["questions", "loaded.base.from"])
def test_a_model_of_other_inputs_is_not_compared(changed, spec, trained, tmp_path):
    """The files and models that a recipe names may change after a training."""
    questions, base = tmp_path / "train.jsonl", tmp_path / "base"
    write_questions(questions, seed=0)
    shutil.copytree(BUNDLED_FOLDER / "prosqa", base)
    stages = [{"steps": 1, "iterations": 2, "data": [{"task": "prosqa", "file": str(questions)}]}]
    path = spec(vary={}, seeds=[0], set={"base": {"from": str(base)}, "stages": stages, "threads": 1})
    rows = sweep.run_sweep(path)
    assert sweep.run_sweep(path, finished_only=True) == rows
    if changed == "questions":
        write_questions(questions, seed=1)
    else:
        tiny.edit_json(base / "tokenizer_config.json", model_max_length=77)
    for finished_only in (True, False):
        with pytest.raises(ConfigError, match=rf'trained already: {changed}.* was ".*" when it was started and is "'):
            sweep.run_sweep(path, finished_only=finished_only)
    questions.unlink()
    shutil.rmtree(base)
    assert sweep.run_sweep(path) == rows
    assert len(trained) == 1


@pytest.mark.slow
def test_an_interrupted_training_is_resumed(spec, monkeypatch, tmp_path):
    resumed = []
    real = sweep.train

    def train(config, *, resume):
        resumed.append(resume)
        return real(config, resume=resume)

    monkeypatch.setattr(sweep, "train", train)
    path = spec(seeds=[0], vary={}, set={"stages": DATA["stages"][:1], "save_steps": 1})
    sweep.run_sweep(path)
    (model,) = (tmp_path / "out" / "models").iterdir()
    (model / "training.json").unlink()
    sweep.run_sweep(path)
    assert resumed == [False, True]

    # Interrupted while it wrote its first checkpoint: there is nothing to resume.
    for state in (model / "steps").glob("checkpoint-*/trainer_state.json"):
        state.unlink()
    for written in model.iterdir():
        if written.is_file():
            written.unlink()
        elif written.name != "steps":
            shutil.rmtree(written)
    sweep.run_sweep(path)
    assert resumed == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vary": {"loop.residual.sauce": ["none"]}}, "sauce"),
        ({"vary": {"loop.residual.source": ["none", "nowhere"]}}, "loop.residual.source"),
        ({"evaluate": []}, "evaluate"),
        ({"evaluate": [{**JUDGE, "methods": ["thinking"]}]}, "thinking"),
        ({"evaluate": [{**JUDGE, "methods": ["cot"]}]}, "cot"),
        ({"evaluate": [{**JUDGE, "task": "chess"}]}, "chess"),
        ({"evaluate": [{**JUDGE, "generator_options": {"knights": 2}}]}, "knights"),
        ({"recipe": "none.yaml"}, "none.yaml"),
        ({"colour": "red"}, "colour"),
        ({"models": {"it": "prosqa"}}, "either recipe or models"),
        ({"recipe": None, "models": {"it": "prosqa"}}, "seeds"),
        ({"evaluate": [{**JUDGE, "variants": ["it"]}]}, "it is not one of"),
        ({"evaluate": [{**JUDGE, "iterations": [1], "loop": {"max_iterations": 2}}]}, "iterations"),
    ],
)
def test_errors_before_training(spec, trained, changes, named):
    with pytest.raises(ConfigError, match=named):
        sweep.run_sweep(spec(**changes))
    assert trained == []


def test_a_spec_that_is_no_yaml(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("recipe: [")
    with pytest.raises(ConfigError, match="YAML"):
        sweep.run_sweep(path)


def test_other_settings_are_other_questions(spec, trained):
    judges = [JUDGE | {"methods": ["slr"], "loop": loop} for loop in ({}, {"max_iterations": 1})]
    rows = sweep.run_sweep(spec(vary={}, seeds=[0], evaluate=judges))
    assert rows[1].to_json()["question_set"] == f"{rows[0].questions}; max_iterations=1"
    assert json.loads(json.dumps([row.to_json() for row in rows]))[1]["iterations"] == 1


def test_the_command_prints_a_table_and_keeps_its_rows(spec, trained, tmp_path):
    judges = [JUDGE | {"methods": ["slr"], "loop": loop} for loop in ({}, {"max_iterations": 1})]
    arguments = ["sweep", str(spec(vary={}, evaluate=judges)), "--output", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("unchanged") == 2
    record = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["seed"], row["iterations"] == 1) for row in record["rows"][1::2]] == [(0, True), (1, True)]


def test_command_prints_nothing_but_json(spec, tmp_path):
    """A training prints its losses."""
    result = CliRunner().invoke(cli.app, ["sweep", str(spec(vary={}, seeds=[0])), "--json"])
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["rows"]) == 2
    assert "loss" in result.stderr


@pytest.mark.slow
def test_variant_names(spec, trained):
    named = {"both": {"loop.residual.source": "initial", "loop.timestep.kind": "none"}, "plain": {}}
    rows = sweep.run_sweep(spec(variants=named, vary={"chains": [1, 2]}, seeds=[0]))
    assert [(c.loop.residual.source, c.chains) for c in trained] == [
        ("initial", 1),
        ("initial", 2),
        ("previous", 1),
        ("previous", 2),
    ]
    assert [row.variant.label for row in rows[::2]] == [
        f"{name}, chains={chains}" for name in named for chains in (1, 2)
    ]
    assert rows[0].variant.name == "both, chains=1, seed=0"


def test_device_and_dtype(spec, trained, monkeypatch):
    """Of the models that are evaluated."""
    asked = []

    def load(path, **options):
        asked.append(options)
        return load_reasoner(path)

    monkeypatch.setattr(sweep, "load_reasoner", load)
    sweep.run_sweep(spec(vary={}, seeds=[0]), device="cpu", dtype="bfloat16")
    assert asked == [{"device": "cpu", "dtype": "bfloat16", "quantization": "none"}]


def test_changed_variant_is_trained_again(spec, trained):
    sweep.run_sweep(spec(variants={"one": {"chains": 1}}, vary={}, seeds=[0]))
    sweep.run_sweep(spec(variants={"one": {"chains": 2}}, vary={}, seeds=[0]))
    assert [config.chains for config in trained] == [1, 2]


def test_methods_of_variants(spec, trained):
    """Those that need weights of their own run on the variants trained for them; others on theirs."""
    judges = [JUDGE | {"methods": ["cot"], "variants": ["written"]}, JUDGE | {"methods": ["slr"], "variants": ["loop"]}]
    named = {"written": {"max_iterations": 0, "chain_of_thought": True, "objectives.chains": 0}, "loop": {}}
    rows = sweep.run_sweep(spec(vary={}, variants=named, seeds=[0], evaluate=judges))
    assert [(row.variant.label, row.method) for row in rows] == [("loop", "slr"), ("written", "cot")]


def test_finished_models(spec, trained, tmp_path):
    """A file may name them in place of a recipe; forced to several depths, each has one row per depth."""
    evaluation = {key: value for key, value in JUDGE.items() if key != "methods"} | {"iterations": [0, 2]}
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({"models": {"it": "prosqa"}, "output_dir": str(tmp_path), "evaluate": [evaluation]}))
    assert sweep.run_sweep(path, finished_only=True) == []
    rows = sweep.run_sweep(path)
    assert [(row.variant.name, row.variant.seed, row.summary.iterations) for row in rows] == [
        ("it", None, 0),
        ("it", None, 2),
    ]
    assert len(rows[0].questions_sha256) == 64
    assert sweep.run_sweep(path, finished_only=True) == rows
    assert trained == []


def test_only_finished(spec, trained, tmp_path):
    rows = sweep.run_sweep(spec(vary={}, seeds=[0]))
    trained.clear()
    path = spec(vary={}, seeds=[0, 1])
    assert sweep.run_sweep(path, finished_only=True) == rows
    result = CliRunner().invoke(cli.app, ["sweep", str(path), "--finished", "--json"])
    assert [row["seed"] for row in json.loads(result.stdout)["rows"]] == [0, 0]
    assert trained == []


@pytest.fixture
def finished(tmp_path):
    """Writes a spec of finished models."""

    def write(models, evaluate):
        path = tmp_path / "models.yaml"
        path.write_text(yaml.safe_dump({"models": models, "output_dir": str(tmp_path), "evaluate": evaluate}))
        return path

    return write


def test_each_set_of_questions_has_its_table(finished):
    """They differ in nothing that the table's title says but their names."""
    asked = {**JUDGE, "methods": ["slr"]}
    judges = [{**asked, "name": "few"}, {**asked, "name": "more", "generate": 8}, {**asked, "generate": 6}]
    result = CliRunner().invoke(cli.app, ["sweep", str(finished({"it": "prosqa"}, judges))])
    titles = [line for line in result.stdout.splitlines() if "prosqa: generated" in line]
    assert [title.partition(":")[0] for title in titles] == ["few", "more", "prosqa"]
    assert [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("it")] == [["it", "1"]] * 3


def test_a_missing_model_is_told_before_another_is_asked(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "load_reasoner", None)
    path = finished({"it": "prosqa", "gone": f"{tmp_path}/gone"}, [JUDGE])
    for finished_only in (False, True):
        with pytest.raises(ConfigError, match=r"models\.yaml: models\.gone: .*/gone: no such file or folder"):
            sweep.run_sweep(path, finished_only=finished_only)


def test_finished_says_how_many(finished):
    result = CliRunner().invoke(
        cli.app, ["sweep", str(finished({"a": "prosqa", "b": "prosqa"}, [JUDGE])), "--finished"]
    )
    assert (result.exit_code, result.stdout) == (0, "")
    assert "0 of 2 models have all their figures" in result.stderr


def test_finished_writes_nothing(finished, tmp_path):
    path = finished({"a": "prosqa"}, [JUDGE])
    path.write_text(path.read_text().replace(str(tmp_path), "/proc/nowhere"))
    assert sweep.run_sweep(path, finished_only=True) == []
    with pytest.raises((ConfigError, DataError), match="/proc/nowhere"):
        sweep.run_sweep(path)


def test_output_does_not_replace_what_the_sweep_reads(finished, tmp_path):
    path = finished({"a": "prosqa"}, [JUDGE])
    for output, named in (path, "spec"), (tmp_path / "results.jsonl", "the stored answers"):
        result = CliRunner().invoke(cli.app, ["sweep", str(path), "--output", str(output)])
        assert isinstance(result.exception, ConfigError)
        assert f"it is the file of {named}, which would be replaced" in str(result.exception)
    assert not (tmp_path / "results.jsonl").exists()
