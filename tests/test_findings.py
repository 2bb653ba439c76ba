"""docs/findings.md is what its rows give; a spec of each kind runs from the start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import findings, findings_tables, patching
from slr_core import cli
from slr_core.errors import DataError
from slr_core.evaluation.sweep import SweepConfig, expand_variants, run_sweep
from slr_core.training.base_config import BaseConfig
from slr_core.training.build import build, load_teacher
from slr_core.training.config import TrainConfig
from slr_core.training.data import Collator, StageStream
from slr_core.training.loss_module import LossModule
from slr_core.training.trainer import train

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "configs/findings"
SWEEPS = sorted(path.stem for path in SPECS.glob("*.yaml") if "evaluate:" in path.read_text())
ROW = {"variant": "N 100", "seed": 0, "name": "q", "question_set": "q", "questions_sha256": "ab" * 32, "loop": {}}


@pytest.fixture
def contents():
    part = {"rows": "one", "title": "A study", "command": "slr sweep one.yaml"}
    return lambda **more: findings.Contents.model_validate(
        {
            "introduction": "# It",
            "terms": "Terms.",
            "sections": ({"title": "RQ1: why, S?", "question": "Q?", "answer": "A.", "parts": (part | more,)},),
        }
    )


def write_rows(folder, *scores):
    rows = [{**ROW, "seed": seed, "method": "slr", "questions": 10, "accuracy": x} for seed, x in enumerate(scores)]
    (folder / "one.json").write_text(json.dumps({"manifest": {}, "rows": rows}))
    return findings.sha256((folder / "one.json").read_bytes()).hexdigest()


def test_page_is_built_from_its_rows():
    built = findings.build(findings.read_contents(), findings.ROWS)
    assert findings.PAGE.read_text() == built.text, "make findings"
    assert {path.name for path in (findings.PAGE.parent / findings.PLOTS).iterdir()} == set(built.plots)


@pytest.mark.slow
def test_plots_are_drawn_from_their_rows():
    for name, draw in findings.build(findings.read_contents(), findings.ROWS).plots.items():
        assert (findings.PAGE.parent / findings.PLOTS / name).read_text() == draw(), "make findings"


def test_every_study_is_on_the_page():
    """And each row names its seed, the hash of its questions and its interval."""
    parts = [part for section in findings.read_contents().sections for part in section.parts]
    assert {part.rows for part in parts} >= {*SWEEPS, *(path.stem for path in findings.ROWS.glob("*.json"))}
    for stem in SWEEPS:
        file = findings.ROWS / f"{stem}.json"
        for row in json.loads(file.read_text())["rows"] if file.exists() else ():
            assert len(row["questions_sha256"]) == 64
            assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]


def test_cells(contents, tmp_path):
    write_rows(tmp_path, 0.5, 0.9)
    built = findings.build(contents(plot={"x": "variant", "title": "T", "x_label": "N"}), tmp_path)
    assert "| N 100 | 2 | 0.700 (0.481 to 0.855; seeds 0.500 to 0.900) |" in built.text
    assert "Training seeds: 0, 1." in built.text
    assert "10 of sha256 abababababab" in built.text
    assert built.plots["one.svg"]().count("<svg") == 1


def runs(*scores, variant="as it is", questions=100, iterations=2):
    return [
        {**ROW, "variant": variant, "seed": seed, "questions": questions, "accuracy": x, "method": "slr"}
        | {"loop": {"max_iterations": iterations}}
        for seed, x in enumerate(scores)
    ]


def test_an_effect_shows_with_every_seed_and_by_intervals_apart():
    recipe = runs(0.50, 0.60, 0.70)
    assert findings_tables.effect(recipe, runs(0.30, 0.40, 0.50)) == pytest.approx(-0.2)
    assert findings_tables.effect(recipe, runs(0.70, 0.80, 0.90)) == pytest.approx(0.2)
    assert findings_tables.effect(recipe, runs(0.10, 0.10, 0.71)) is None, "one seed is above"
    assert findings_tables.effect(recipe, runs(0.10, 0.10, 0.70)) is None, "one seed is level"
    assert findings_tables.effect(recipe, runs(0.49, 0.59, 0.69)) is None, "the intervals overlap"
    assert findings_tables.effect(runs(0.5, 0.6), runs(0.1, 0.2, 0.3)) == pytest.approx(-0.35), "of seeds in both"
    assert findings_tables.effect(recipe, runs(0.1)) is None, "a single seed"
    assert findings_tables.effect(recipe, recipe) is None


def test_table_of_effects():
    study = [
        *runs(0.9, 0.9),
        *runs(0.5, 0.5, iterations=4),
        *runs(0.5, 0.5, variant="residual none"),
        *runs(0.5, 0.4, variant="residual none", iterations=4),
        *runs(0.4, 0.4, variant="frozen base"),
        *runs(0.4, 0.4, variant="frozen base", iterations=4),
        *runs(0.4, 0.4, variant="frozen base, rank 64"),
        *runs(0.8, 0.8, variant="frozen base, rank 64", iterations=4),
    ]
    lines = findings_tables.effects_table([("A", study), ("B", runs(0.5, variant="rank 2"))]).splitlines()
    assert lines[0] == "| study | compared with | questions | trained depth | 2x |"
    assert lines[2:] == [
        "| A | as it is | q | 0.90; residual none -40 | 0.50 |",
        "| A | frozen base | q | 0.40 | 0.40; rank 64 +40 |",
    ]


def test_all_differences_stand_before_the_parts(tmp_path):
    rows = [*runs(0.9, 0.9), *runs(0.5, 0.5, variant="residual none")]
    (tmp_path / "one.json").write_text(json.dumps({"manifest": {}, "rows": rows}))
    part = {"title": "A study", "command": "slr sweep"}
    parts = ({**part, "rows": "one"}, {**part, "rows": "none"})
    section = {"title": "S", "question": "Q?", "answer": "A.", "effects": "What.\nThen.", "parts": parts}
    text = findings.build(
        findings.Contents.model_validate({"introduction": "", "terms": "", "sections": (section,)}), tmp_path
    ).text
    before, _, after = text.partition("### A study")
    assert "### All differences\n\nWhat.\n\nThen.\n\n| study |" in before
    assert "residual none -40" in before
    assert "residual none" in after


def test_names_of_settings_are_short():
    assert findings_tables.variant_name(ROW | {"variant": "a, stages.0.data.0.questions=100"}) == "a, questions=100"
    assert findings_tables.variant_name(ROW | {"variant": "loop.lora.rank=4, seed=0.5"}) == "rank=4, seed=0.5"


def test_without_rows(contents, tmp_path):
    assert "Not run yet. The command: `slr sweep one.yaml`." in findings.build(contents(), tmp_path).text


def test_answers_are_at_the_top(contents, tmp_path):
    text = findings.build(contents(), tmp_path).text
    assert text.startswith("# It\n\n- [RQ1: why, S?](#rq1-why-s): A.\n\nTerms.\n\n## RQ1: why, S?\n\nQ?")


def test_the_first_sentence_of_what_was_found_is_bold(contents, tmp_path):
    digest = write_rows(tmp_path, 0.5)
    text = findings.build(contents(found="No: 0.5. Not at all. No.\nPast it too.", rows_sha256=digest), tmp_path).text
    assert "\n\n**No: 0.5.**\n\nNot at all. No.\n\nPast it too.\n\n" in text


def test_sentences_belong_to_their_rows(contents, tmp_path):
    digest = write_rows(tmp_path, 0.5)
    assert "**So.**" in findings.build(contents(found="So.", rows_sha256=digest[:12]), tmp_path).text
    write_rows(tmp_path, 0.6)
    for known in (digest[:12], None):
        with pytest.raises(DataError, match="read the sentence again"):
            findings.build(contents(found="So.", rows_sha256=known), tmp_path)


@pytest.mark.parametrize("name", SWEEPS)
def test_specs(name):
    sweep = SweepConfig.from_yaml(SPECS / f"{name}.yaml")
    assert list(expand_variants(sweep, SPECS))
    assert sweep.models or len(sweep.seeds) == 3
    assert sweep.output_dir == f"runs/findings/{name}"


def trained_base(folder, tmp_path):
    """The base in ``folder``, from two steps of its recipe."""
    out = tmp_path / "base"
    if not out.exists():
        changes = [f"output_dir={out}", "stages.0.steps=2", "optimizer.batch_size=2"]
        train(TrainConfig.from_yaml(SPECS / f"{Path(folder).name}.yaml", changes))
    return str(out)


def shrunk(name, tmp_path, **changes):
    """A spec with one model, two steps and few questions."""
    spec = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    if "base.from" in spec.get("set", {}):
        spec["set"]["base.from"] = trained_base(spec["set"]["base.from"], tmp_path)
    for evaluation in spec["evaluate"]:
        evaluation |= {"generate": 2, "iterations": evaluation.get("iterations", [])[:1]}
    spec |= {"output_dir": str(tmp_path / "out")} | changes
    if "recipe" in spec:
        spec |= {"recipe": str(SPECS / spec["recipe"]), "seeds": [0]}
        settings = spec.setdefault("set", {})
        settings |= {"optimizer.batch_size": 2, "save_steps": 1}
        settings |= {} if "stages" in settings else {"stages.0.steps": 2}
        for one in (settings, *spec.get("variants", {}).values()):
            if "curriculum" in one:
                one["curriculum"] |= dict.fromkeys(("stages", "first_steps", "stage_steps", "last_steps"), 1)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "rows"),
    [
        ("thinking_longer", {}, 6),
        ("data", {"vary": {"stages.0.data.0.questions": [4]}}, 5),
        ("methods", {}, 16),
        ("curriculum", {}, 8),
        ("curriculum_gpt2", {}, 16),
    ],
)
def test_sweeps_run(name, changes, rows, tmp_path):
    path = shrunk(name, tmp_path, **changes)
    ran = run_sweep(path)
    assert len(ran) == rows
    assert run_sweep(path, finished_only=True) == ran
    shown = "methods" if name == "methods" else "accuracy"
    assert findings_tables.TABLES[shown]({"rows": [row.to_json() for row in ran]})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SWEEPS if "recipe:" in (SPECS / f"{name}.yaml").read_text()])
def test_every_variant_starts(name, tmp_path):
    spec = SweepConfig.from_yaml(SPECS / f"{name}.yaml")
    seen = set()
    for variant in expand_variants(spec, SPECS):
        if variant.values["variant"] in seen:
            continue
        seen.add(variant.values["variant"])
        config = variant.config
        base = str(config.base.source)
        if base.startswith("runs/"):
            config = config.model_copy(update={"base": BaseConfig(source=trained_base(base, tmp_path))})
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"batch_size": 2})})
        reasoner = build(config)
        module = LossModule(reasoner, config, load_teacher(config, reasoner))
        for first_step in (0, config.total_steps - 1):
            items = next(iter(StageStream(config, first_step)))
            terms, _ = module(Collator(reasoner.tokenizer, config, reasoner.config.text)(items))
            total = torch.stack([term.value for term in terms.values()]).sum()
            if total.requires_grad:
                total.backward()
            assert total.isfinite()


@pytest.mark.slow
def test_patching_runs(monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["patching", "--questions", "2", "--hops", "3", "--out", str(out)])
    patching.main()
    record = json.loads(out.read_text())
    assert len(record["rows"]) == 1 + 3 * 4
    assert "rival frontier" in findings_tables.TABLES["patching"](record)[0]


@pytest.mark.slow
def test_probes_run(tmp_path):
    command = next(p.command for s in findings.read_contents().sections for p in s.parts if p.kind == "lens")
    words = command.replace("--generate 600", "--generate 60").split()[1:]
    assert cli.app([*words, "--output", str(tmp_path / "probe.json")], standalone_mode=False) is None
    record = findings.reduce_probe(json.loads((tmp_path / "probe.json").read_text()))
    assert findings_tables.TABLES["lens"](record)[0].count("\n") == 1 + 9


@pytest.mark.slow
def test_sweep_continues_after_kill(tmp_path):
    path = shrunk("iterations", tmp_path, variants={"T 1": {}, "T 2": {"loop.trained_iterations": 5}})
    run = [sys.executable, "-m", "slr_core.cli", "sweep", str(path)]
    started = subprocess.Popen(
        run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    models, deadline = tmp_path / "out/models", time.monotonic() + 120
    while not list(models.glob("*/steps/checkpoint-1/trainer_state.json")):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert len(run_sweep(path)) == 2 * 3
