import io
import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from slr_core import __version__, cli
from slr_core.generation import generate
from slr_core.tasks.prosqa import GraphSpec
from slr_core.tasks.prosqa import generate as make
from slr_core.training.trainer import build
from tests import tiny
from tests.training.recipe import DATA, recipe

QUESTION = "Tom is a rompus. Every rompus is a lempus. Sam is a impus. Is Tom a impus or lempus?"
LOOP = ["--max-iterations", "3", "--criterion", "fixed"]


@pytest.fixture(scope="module")
def made():
    reasoner = build(recipe())
    tiny.shake(reasoner)
    return reasoner.eval()


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    made.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as installed: its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slr", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def expected(made, loop=None):
    loop = {"max_iterations": 3, "criterion": "fixed"} if loop is None else loop
    return generate(made, [tiny.request(made, QUESTION, loop)])[0]


def test_generate_prints_the_answer(run, made, folder):
    code, out, err = run("generate", "--model", folder, *LOOP, QUESTION)
    assert (code, out) == (0, expected(made).text + "\n")
    assert "3 iterations, max_iterations" in err


def test_the_prompt_can_come_from_standard_input(run, made, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    _, out, _ = run("generate", "--model", folder, *LOOP, "-")
    assert out == expected(made).text + "\n"


def test_generate_as_json(run, made, folder):
    _, out, _ = run("generate", "--model", folder, "--max-iterations", 0, "--json", QUESTION)
    found, result = json.loads(out), expected(made, {"max_iterations": 0})
    assert (found["text"], found["iterations"], found["final_change"]) == (result.text, 0, None)
    assert found["usage"] == {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "forward_passes": result.forward_passes,
    }


def test_sampling_has_a_seed(run, folder):
    options = ["generate", "--model", folder, "--temperature", 2.0, "--top-k", 40, "--seed", 5]
    assert run(*options, QUESTION)[1] == run(*options, QUESTION)[1]
    texts = {run(*options[:-1], seed, QUESTION)[1] for seed in range(5)}
    assert len(texts) > 1


def test_trace_has_a_line_an_iteration(run, made, folder):
    code, out, _ = run("trace", "--model", folder, *LOOP, "--top-tokens", 2, QUESTION)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]
    assert expected(made).text in out
    for line, record in zip(lines[1:4], expected(made).records, strict=True):
        assert f"{record.relative_change:.3f}" in line
        assert record.adapter in line


def test_trace_as_json(run, made, folder):
    found = json.loads(run("trace", "--model", folder, *LOOP, "--top-tokens", 2, "--json", QUESTION)[1])
    assert [record["t"] for record in found["trace"]] == [1, 2, 3]
    assert all(len(record["top_tokens"]) == 2 for record in found["trace"])
    assert found["stability"]["converged"] is False
    assert found["text"] == expected(made).text


def test_info(run, made, folder):
    code, out, _ = run("info", "--model", folder)
    assert code == 0
    assert "LlamaForCausalLM" in out
    found = json.loads(run("info", "--model", folder, "--json")[1])
    assert found["config"]["loop"] == made.config.loop.model_dump(mode="json")


def test_eval_of_generated_questions(run, folder, tmp_path):
    figures = tmp_path / "figures.json"
    options = ["--generate", 6, "--generate-seed", 1, "--nodes", 8, "--max-hops", 3, "--json", figures]
    code, out, _ = run("eval", "--model", folder, *options)
    assert code == 0
    assert "depth_rule" in out
    record = json.loads(figures.read_text())
    assert record["overall"]["questions"] == 6
    assert record["baselines"] == {"depth_rule": 0.5}
    assert "seed 1, balanced" in record["source"]


def test_eval_of_a_file(run, folder, tmp_path):
    figures = tmp_path / "figures.json"
    data = tmp_path / "questions.jsonl"
    stream = make(GraphSpec(8, 1, 3), 0)
    data.write_text("".join(json.dumps(next(stream).to_json()) + "\n" for _ in range(5)))
    code, _, _ = run("eval", "--model", folder, "--data", data, "--limit", 3, "--json", figures)
    assert code == 0
    assert json.loads(figures.read_text())["overall"]["questions"] == 3


def test_train(run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**DATA, "stages": DATA["stages"][:1]}))
    code, out, _ = run("train", path, "--set", f"output_dir={tmp_path / 'out'}", "--set", "seed=9")
    assert code == 0
    assert str(tmp_path / "out") in out
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["seed"] == 9


WRONG = {
    "no-such-model": ["generate", "--model", "/no/where", "x"],
    "empty-prompt": ["generate", "--model", "FOLDER", " "],
    "criterion": ["generate", "--model", "FOLDER", "--criterion", "vibes", QUESTION],
    "bounds": ["generate", "--model", "FOLDER", "--min-iterations", "4", "--max-iterations", "2", QUESTION],
    "eval-what": ["eval", "--model", "FOLDER"],
    "eval-both": ["eval", "--model", "FOLDER", "--data", "x", "--generate", "3"],
    "eval-file": ["eval", "--model", "FOLDER", "--data", "/no/where.jsonl"],
    "eval-task": ["eval", "--model", "FOLDER", "--task", "chess", "--generate", "3"],
    "eval-dials": ["eval", "--model", "FOLDER", "--generate", "3", "--nodes", "3"],
    "eval-output": ["eval", "--model", "FOLDER", "--generate", "1", "--json", "/no/where/figures.json"],
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line_and_exit_code_1(case, run, folder):
    code, out, err = run(*(folder if word == "FOLDER" else word for word in WRONG[case]))
    assert code == 1
    assert err.startswith("slr: ")
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "--max-iterations", "-1", "x"],
        ["generate", "--max-iterations", "many", "x"],
        ["generate", "--patience", "0", "x"],
        ["generate", "--threshold", "nan", "x"],
        ["generate", "--threshold", "-1", "x"],
        ["generate", "--top-p", "1.5", "x"],
        ["trace", "--top-tokens", "51", "x"],
        ["train", "/no/where.yaml"],
        ["nonesuch"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_version_and_help(run):
    assert run("--version")[:2] == (0, f"slr {__version__}\n")
    assert CliRunner().invoke(cli.app, ["--help"]).exit_code == 0
