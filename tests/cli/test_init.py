import json
import shlex

import pytest
import yaml

from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.read import load_checkpoint
from slr_core.config import SLRConfig
from slr_core.reasoner import LatentReasoner
from tests import tiny


@pytest.fixture
def plain(tmp_path):
    """A base model's folder."""
    tiny.base().save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_folder_answers(run, plain, tmp_path):
    (tmp_path / "loop.yaml").write_text("workspace: block\n")
    options = ["--out", tmp_path / "out", "--config", tmp_path / "loop.yaml"]
    code, out, err = run("init", plain, *options)
    sizes = describe_model(load_checkpoint(LatentReasoner, tmp_path / "out"))
    assert (code, err) == (0, "")
    assert f"{sizes.added_parameters:,} parameters, {sizes.added_share:.1%} of the base" in out
    assert "block of 8" in out
    described, _, _ = out.partition("\nNext, ")
    assert run("info", "--model", tmp_path / "out")[1] == described
    code, out, _ = run("generate", "--model", tmp_path / "out", "--json", "w1 w2")
    assert (code, json.loads(out)["usage"]["prompt_tokens"]) == (0, 2)
    code, out, err = run("init", plain, *options)
    assert (code, out) == (1, "")
    assert "new or empty folder" in err


def test_untrained_until_trained(run, plain, tmp_path):
    """``init`` and ``info`` say so, and the command that ``init`` prints trains the loop."""
    _, out, _ = run("init", plain, "--out", tmp_path / "out")
    assert "rank 8, untrained" in out
    assert "0 until the loop is trained; then 1 to 6" in out
    assert SLRConfig.from_json(tmp_path / "out" / "slr_config.json").trained is False
    _, off, _ = run("generate", "--model", tmp_path / "out", "--json", "w1 w2")
    _, on, _ = run("generate", "--model", tmp_path / "out", "--json", "--max-iterations", "2", "w1 w2")
    assert (json.loads(off)["iterations"], json.loads(on)["iterations"] > 0) == (0, True)
    assert "trained for" not in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["slr", "train"]
    recipe = tmp_path / "recipe.yaml"
    questions = [{"question": f"w{i}", "steps": [], "answer": f"w{i + 1}"} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    stage = {"steps": 2, "iterations": 2, "data": [{"task": "text", "file": str(tmp_path / "questions.jsonl")}]}
    recipe.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "stages": [stage]}))
    code, _, err = run(*(str(recipe) if word == "RECIPE.yaml" else word for word in command[1:]))
    assert code == 0, err
    assert "trained for 6 iterations" in run("info", "--model", tmp_path / "run")[1]
    assert SLRConfig.from_json(tmp_path / "run" / "slr_config.json").trained is True


def test_dtype(run, plain, tmp_path):
    assert "bfloat16 on cpu" in run("init", plain, "--out", tmp_path / "out", "--dtype", "bfloat16")[1]


def test_recursive(run, plain, tmp_path):
    options = ["--out", tmp_path / "out", "--recursive", 2]
    code, out, err = run("init", plain, *options, "--rank", 4, "--share", "lower")
    assert (code, err) == (0, "")
    assert "per_iteration, rank 4" in out
    assert "stops when  all iterations have run (fixed)" in out
    assert "docs/recursive.md has a recipe" in out
    assert run("info", "--model", tmp_path / "out")[1] == out.partition("\nNext, ")[0]
    answered = json.loads(run("generate", "--model", tmp_path / "out", "--json", "w1 w2")[1])
    assert (answered["iterations"], answered["exit_reason"]) == (2, "max_iterations")
    for wrong, message in (
        (["--recursive", 3], "divide the 2 layers, got 3"),
        (["--rank", 4], "belong to --recursive"),
        (["--recursive", 2, "--rank", "half"], "a number above 0, or full"),
    ):
        code, _, err = run("init", plain, "--out", tmp_path / "wrong", *wrong)
        assert code, wrong
        assert message in " ".join(err.split())


def test_json(run, plain, tmp_path):
    found = json.loads(run("init", plain, "--out", tmp_path / "out", "--seed", 3, "--json")[1])
    assert found["added_parameters"] == found["adapter_parameters"] + found["module_parameters"]
    assert found["untrained"] is True
    assert found == json.loads(run("info", "--model", tmp_path / "out", "--json")[1]) | {"config": found["config"]}
