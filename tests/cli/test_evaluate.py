"""``slr eval``, ``compare``, ``stability`` and ``report``, as installed."""

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from slr_core import __version__, cli
from slr_core.client.core import retry_policy
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import METHODS, MethodSettings
from slr_core.evaluation.run import identify_model, run_method
from slr_core.evaluation.stability import ExitPoint, best_exits
from slr_core.evaluation.statistics import summarize, wilson_interval
from slr_core.evaluation.store import Store
from slr_core.tasks.base import read_jsonl
from slr_core.tasks.prosqa import GraphSpec, ProsQA, generate_prosqa
from tests.server.test_process import Server

OPTION, TASK = "--generator-option", ["--task", "prosqa"]
SMALL = [*TASK, "--generate", "6", "--generate-seed", "1", OPTION, "nodes=8", OPTION, "balanced=true"]
SMALL += [OPTION, "min_hops=1", OPTION, "max_hops=3"]
FORCED = ["--criterion", "fixed", "--max-iterations", "3"]


@pytest.fixture
def data(tmp_path):
    """A file of five questions."""
    path = tmp_path / "set" / "questions.jsonl"
    path.parent.mkdir()
    stream = generate_prosqa(GraphSpec(8, 1, 3), 0)
    path.write_text("".join(json.dumps(next(stream).to_json()) + "\n" for _ in range(5)))
    return path


def outcomes(path):
    """The outcome lines of a results file."""
    return [line for line in path.read_text().splitlines() if line.startswith('{"of"')]


# -- eval ------------------------------------------------------------------------------------------------


def test_eval_of_generated_questions(run, folder, tmp_path):
    figures = tmp_path / "figures.json"
    code, out, _ = run("eval", "--model", folder, *SMALL, "--output", figures)
    assert code == 0
    assert "shortcut rule depth_rule (needs no reasoning): 0.500" in out
    record = json.loads(figures.read_text())
    assert record["method"] == "slr"
    assert record["overall"]["questions"] == 6
    assert sum(level["questions"] for level in record["by_difficulty"].values()) == 6
    assert record["baselines"] == {"depth_rule": 0.5}
    manifest = record["manifest"]
    assert "seed 1, nodes=8" in manifest["source"]
    assert (manifest["questions"], manifest["slr"]) == (6, __version__)
    assert manifest["model"] == identify_model(folder)
    assert manifest["command"] == shlex.join(["slr", "eval", "--model", folder, *SMALL, "--output", str(figures)])
    assert {"python", "torch", "transformers"} <= set(manifest)


@pytest.mark.parametrize("command", ["eval", "compare", "stability", "probe"])
@pytest.mark.parametrize("option", ["--data", "--results"])
def test_output_does_not_replace_another_file(run, monkeypatch, tmp_path, command, option):
    """Before anything is loaded, however the file is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.jsonl").write_text("kept")
    (tmp_path / "link").symlink_to("file.jsonl")
    for name in ("file.jsonl", "link"):
        code, _, err = run(command, option, tmp_path / "file.jsonl", "--output", name)
        assert (code, err) == (
            1,
            f"slr: --output {name}: it is the file of {option}, which would be replaced; choose another\n",
        )
    assert (tmp_path / "file.jsonl").read_text() == "kept"


@pytest.mark.parametrize("command", ["eval", "compare", "stability", "probe"])
def test_json_is_all_that_is_printed(run, folder, tmp_path, command):
    options = {"compare": ["--methods", "slr"], "stability": ["--past", 1], "probe": ["--probes", "none"]}
    file = tmp_path / "figures.json"
    code, out, _ = run(
        command, "--model", folder, *SMALL, "--limit", 2, *options.get(command, []), "--json", "--output", file
    )
    assert code == 0
    assert json.loads(out) == json.loads(file.read_text())
    assert json.loads(out)["manifest"]["questions"] == 2


def test_eval_of_a_file(run, made, folder, data, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = [*TASK, "--data", data, "--limit", 3, *FORCED, "--method", "slr", "--output", figures]
    code, out, _ = run("eval", "--model", folder, *arguments)
    record = json.loads(figures.read_text())
    settings = MethodSettings({"criterion": "fixed", "max_iterations": 3})
    expected = summarize(run_method(METHODS["slr"], Local(made), ProsQA(), read_jsonl(data)[:3], settings))
    assert code == 0
    assert (record["overall"]["questions"], record["overall"]["iterations"]) == (3, 3.0)
    for name in ("accuracy", "forward_passes", "tokens", "flops"):
        assert record["overall"][name] == getattr(expected, name)
    assert "3.00" in next(line for line in out.splitlines() if line.startswith("all "))
    assert "set/questions.jsonl" in out
    assert str(data.parent.parent) not in json.dumps(record["manifest"]["source"])


@pytest.mark.parametrize(("method", "iterations"), [("no_cot", 0.0), ("slr_fixed", 4.0), ("no_thought", 0.0)])
def test_eval_by_another_method(run, folder, tmp_path, method, iterations):
    figures = tmp_path / "figures.json"
    assert run("eval", "--model", folder, *SMALL, "--method", method, "--output", figures)[0] == 0
    record = json.loads(figures.read_text())
    assert (record["method"], record["overall"]["iterations"]) == (method, iterations)


def test_loop_options_hold_for_a_model_trained_for_its_method(run, folder, tmp_path):
    figures = tmp_path / "figures.json"
    assert run("eval", "--model", folder, *SMALL, "--method", "pause", *FORCED, "--output", figures)[0] == 0
    assert json.loads(figures.read_text())["overall"]["iterations"] == 3.0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("cott=x", "--weights cott: no method has weights of that name; .* did you mean cot"),
        ("no_thought=/no/where", "/no/where: no such"),
        ("no_thought={tmp}", "--weights no_thought=.*: expected a checkpoint"),
        ("no_thought=b", "--weights no_thought: given twice, a and b"),
    ],
)
def test_weights_are_checked_before_anything_is_answered(run, folder, tmp_path, given, told):
    results = tmp_path / "results.jsonl"
    before = ["--weights", "no_thought=a"] if "twice" in told else []
    options = ["--methods", "slr,no_thought", *before, "--weights", given.format(tmp=tmp_path), "--results", results]
    code, _, err = run("compare", "--model", folder, *SMALL, *options)
    assert code != 0
    assert re.search(told, err)
    assert not results.exists()


@pytest.mark.parametrize("command", ["eval", "compare", "stability", "probe"])
def test_results_that_cannot_be_written_are_told_before_the_model_is_loaded(run, folder, tmp_path, command):
    (tmp_path / "file").touch()
    results = tmp_path / "file/results.jsonl"
    code, _, err = run(command, "--model", folder, *SMALL, "--results", results, "--device", "unknown")
    assert code == 1
    assert "results.jsonl: the results cannot be written" in err


def test_eval_goes_on_with_its_results(run, folder, tmp_path):
    results, first, second = tmp_path / "results.jsonl", tmp_path / "first.json", tmp_path / "second.json"
    assert run("eval", "--model", folder, *SMALL, "--results", results, "--output", first)[0] == 0
    before = outcomes(results)
    lines = results.read_text().splitlines(keepends=True)
    # Killed while it wrote the fifth answer.
    results.write_text("".join(lines[:5]) + lines[5][:50])
    assert run("eval", "--model", folder, *SMALL, "--results", results, "--output", second)[0] == 0
    after = outcomes(results)
    assert after[:4] == before[:4]
    assert len(after) == len(before) == 6
    again = [{**json.loads(line), "seconds": 0} for line in after]
    assert again == [{**json.loads(line), "seconds": 0} for line in before]
    assert run("eval", "--model", folder, *SMALL, "--results", results)[0] == 0
    assert outcomes(results) == after
    # Other settings are another run.
    assert run("eval", "--model", folder, *SMALL, *FORCED, "--results", results)[0] == 0
    assert len(outcomes(results)) == 12
    assert len(Store(results).runs) == 2


KEY = "a key of the server's operator"


@pytest.mark.slow
def test_eval_through_a_server(run, folder, tmp_path, monkeypatch):
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    assert run("eval", "--model", folder, *SMALL, "--output", here)[0] == 0
    server = Server(folder, tmp_path / "log", SLR_API_KEYS=KEY)
    try:
        refused = run("eval", "--server", server.url, *SMALL)
        assert run("eval", "--server", server.url, "--api-key", KEY, *SMALL, "--output", there)[0] == 0
        assert (
            run("eval", "--server", server.url, f"--api-key={KEY}", *SMALL, "--results", tmp_path / "r.jsonl")[0] == 0
        )
        monkeypatch.setenv("SLR_API_KEY", KEY)
        code, out, err = run("eval", "--server", server.url, *SMALL, "--method", "slr_vote")
        compared = run("compare", "--server", server.url, *SMALL, "--methods", "slr,no_cot,noised_thoughts")
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stdout.close()
    mine, its = json.loads(here.read_text()), json.loads(there.read_text())
    for name in ("accuracy", "iterations", "converged", "forward_passes", "tokens"):
        assert its["overall"][name] == mine["overall"][name]
    assert its["overall"]["flops"] is None
    known = identify_model(folder)["sha256"]
    assert its["manifest"]["model"] == {
        **{"name": server.url, "sha256": known},
        **{"dtype": "float32", "quantization": "none"},
    }
    assert refused[:2] == (1, "")
    assert "401" in refused[2]
    for stored in (there, tmp_path / "r.jsonl"):
        assert "--api-key" in stored.read_text()
        assert KEY not in stored.read_text(), "a results file is for others to read"
    assert (code, out) == (1, "")
    assert "needs the model in this process" in err
    assert compared[0] == 0
    assert "noised_thoughts: no figure, it needs the model in this process" in compared[1]


@pytest.mark.parametrize("command", ["eval", "compare", "stability", "probe"])
def test_no_task_is_assumed(run, folder, data, command):
    code, out, err = run(command, "--model", folder, "--generate", 3)
    assert (code, out) == (1, "")
    assert all(name in err for name in ("--task", "prosqa", "gsm8k", "state_tracking"))


# -- compare, stability and report -----------------------------------------------------------------------


@pytest.mark.slow
def test_compare_has_a_figure_or_a_reason_for_every_method(run, folder, tmp_path):
    results, figures = tmp_path / "results.jsonl", tmp_path / "figures.json"
    weights = ["--weights", f"no_thought={folder}", "--weights", f"cot={folder}", "--cot-tokens", 3]
    arguments = [*SMALL, *weights, "--samples", 2, "--beams", 2, "--results", results, "--output", figures]
    code, out, _ = run("compare", "--model", folder, *arguments)
    record = json.loads(figures.read_text())
    assert code == 0
    assert set(record["missing"]) == {"pause", "pause_as_thought", "multipass_pause"}
    assert set(record["figures"]) == set(METHODS) - set(record["missing"])
    for name, reason in record["missing"].items():
        assert f"--weights {name}=DIR" in reason
        assert f"{name}: no figure, {reason}" in out
    for name, summary in record["figures"].items():
        assert summary["interval"] == pytest.approx(wilson_interval(round(6 * summary["accuracy"]), 6))
        assert ("paired_with_slr" in summary) == (name != "slr")
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert f"{summary['accuracy']:.3f}" in line
    assert record["figures"]["no_cot"]["paired_with_slr"]["questions"] == 6
    # The control's weights are the model's own here, without its loop.
    assert record["figures"]["no_thought"]["accuracy"] == record["figures"]["no_cot"]["accuracy"]
    assert record["figures"]["cot"]["tokens"] <= 3
    before = outcomes(results)
    assert len(before) == 6 * len(record["figures"])
    assert run("compare", "--model", folder, *arguments)[0] == 0
    assert outcomes(results) == before


def test_questions_that_do_not_fit(run, folder):
    long = [*TASK, "--generate", 2, OPTION, "nodes=40"]
    weights = ["--weights", f"cot={folder}"]
    code, out, _ = run("compare", "--model", folder, *long, "--methods", "cot,beam,slr", *weights)
    assert code == 1
    for name in ("cot", "beam", "slr"):
        assert f"{name}: no figure, prompt has" in out


@pytest.mark.slow
def test_a_study_its_figures_and_the_report_of_all(run, folder, tmp_path):
    results, figures, page = tmp_path / "results.jsonl", tmp_path / "figures.json", tmp_path / "deep" / "report"
    options = ["--model", folder, *SMALL, "--results", results]
    code, out, _ = run("stability", *options, "--past", 2, "--output", figures)
    record = json.loads(figures.read_text())
    assert code == 0
    assert "4 (trained)" in out
    assert "as configured: accuracy" in out
    shown = [line.split()[:4] for line in out.split("exit criteria")[1].splitlines()[2:]]
    best = best_exits([ExitPoint(**point) for point in record["exits"]])
    assert len({point.criterion for point in best}) == 5
    assert shown == [[p.criterion, f"{p.threshold:.3g}", f"{p.iterations:.2f}", f"{p.accuracy:.3f}"] for p in best]
    assert out.count("in h_0: accuracy") == len(record["noise"]) == 5
    assert list(record["by_depth"]) == [str(t) for t in range(9)]
    assert record["manifest"]["settings"] == {"past": 2, "seed": 0}
    # The loop as configured is there already.
    count = len(outcomes(results))
    assert run("compare", *options, "--methods", "slr,no_cot")[0] == 0
    assert len(outcomes(results)) == count + 6

    code, out, _ = run("report", results, "--out", page)
    assert code == 0
    assert out.split() == [
        str(page / n) for n in ("report.html", "report.md", *(f"figure_1_{i}.svg" for i in (1, 2, 3, 4)))
    ]
    text = (page / "report.md").read_text()
    for said in ("Past the trained depth", "When to stop", "no\\_cot", "slr stability", "slr compare"):
        assert said in text


# -- what goes wrong -------------------------------------------------------------------------------------

WRONG = {
    "no-task": ["eval", "--model", "FOLDER", "--generate", "3"],
    "what": ["eval", "--model", "FOLDER", *TASK],
    "both": ["eval", "--model", "FOLDER", *TASK, "--data", "x", "--generate", "3"],
    "file": ["eval", "--model", "FOLDER", *TASK, "--data", "/no/where.jsonl"],
    "task": ["eval", "--model", "FOLDER", "--task", "chess", "--generate", "3"],
    "split": ["eval", "--model", "FOLDER", *TASK, "--split", "test"],
    "generator-options": ["eval", "--model", "FOLDER", *TASK, "--generate", "3", OPTION, "nodes=3"],
    "generator-option": ["eval", "--model", "FOLDER", *TASK, "--generate", "3", OPTION, "nodes"],
    "unknown-generator-option": ["eval", "--model", "FOLDER", *TASK, "--generate", "3", OPTION, "colour=3"],
    "methods": ["compare", "--model", "FOLDER", *TASK, "--generate", "3", "--methods", "slr,thinking"],
    "server": ["eval", "--server", "http://127.0.0.1:9", *SMALL],
    "model and server": ["compare", "--model", "FOLDER", "--server", "http://127.0.0.1:9", *SMALL],
    "weights": ["compare", "--model", "FOLDER", *SMALL, "--weights", "cot"],
    "no-weights": ["compare", "--model", "FOLDER", *SMALL, "--weights", "cot=/no/where", "--methods", "cot"],
    "model": ["stability", "--model", "/no/where", *SMALL],
    "output": ["eval", "--model", "FOLDER", *TASK, "--generate", "1", "--output", "/no/where/figures.json"],
    "results": ["eval", "--model", "FOLDER", *SMALL, "--results", "GARBAGE"],
    "results-folder": ["eval", "--model", "FOLDER", *SMALL, "--results", "FOLDER"],
    "report": ["report", "GARBAGE"],
    "report-of-nothing": ["report", "EMPTY"],
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line_and_exit_code_1(case, run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("slr_core.client.sync_client.retry_policy", lambda retries: retry_policy(0))
    (tmp_path / "garbage").write_text("hello\n")
    (tmp_path / "empty").touch()
    words = {"FOLDER": folder, "GARBAGE": tmp_path / "garbage", "EMPTY": tmp_path / "empty"}
    code, out, err = run(*(words.get(word, word) for word in WRONG[case]))
    assert (code, out) == (1, "")
    assert err.startswith("slr: ")
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "garbage").read_text() == "hello\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "/no/where.jsonl"],
        ["report"],
        ["eval", "--generate", "0"],
        ["eval", "--limit", "0"],
        ["eval", "--generate", "3", "--method", "thinking"],
        ["eval", *SMALL, "--criterion", "vibes"],
        ["eval", *SMALL, "--threshold", "inf"],
        ["eval", "--batch-size", "0"],
        ["eval", "--nodes", "8"],
        ["compare", "--temperature", "0"],
        ["compare", "--samples", "0"],
        ["compare", "--noise", "inf"],
        ["compare", "--temperature", "nan"],
        ["compare", "--seed", str(2**32)],
        ["stability", "--past", "0"],
        ["stability", "--server", "http://x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2
