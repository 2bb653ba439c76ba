import io
import json
import re
import sys

import pytest

from tests.cli.questions import LOOP, QUESTION, expected


def test_answer(run, made, folder):
    code, out, err = run("generate", "--model", folder, *LOOP, QUESTION)
    assert (code, out) == (0, expected(made).text + "\n")
    assert "3 iterations, max_iterations" in err


def test_standard_input(run, made, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    _, out, _ = run("generate", "--model", folder, *LOOP, "-")
    assert out == expected(made).text + "\n"


def test_json(run, made, folder):
    _, out, _ = run("generate", "--model", folder, "--max-iterations", 0, "--json", QUESTION)
    found, result = json.loads(out), expected(made, {"max_iterations": 0})
    assert (found["text"], found["iterations"], found["final_change"]) == (result.text, 0, None)
    assert found["usage"] == {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "forward_passes": result.forward_passes,
    }


def test_seed(run, folder):
    options = ["generate", "--model", folder, "--temperature", 2.0, "--top-k", 40, "--seed", 5]
    assert run(*options, QUESTION)[1] == run(*options, QUESTION)[1]
    texts = {run(*options[:-1], seed, QUESTION)[1] for seed in range(5)}
    assert len(texts) > 1


def test_stream(run, folder):
    """The same answer as at once, written in pieces."""
    plain = run("generate", "--model", folder, *LOOP, QUESTION)
    code, out, err = run("generate", "--model", folder, *LOOP, "--stream", QUESTION)
    assert (code, out) == plain[:2]
    assert err.startswith("[3 iterations, max_iterations")


def test_stream_is_incremental(run, folder, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *args, **options: pieces.append((args, options)))
    run("generate", "--model", folder, *LOOP, "--stream", QUESTION)
    written = [args[0] for args, options in pieces if options.get("end") == "" and args[0]]
    assert len(written) > 1


def test_file(run, made, folder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": 1, "prompt": QUESTION, "max_iterations": 0}) + "\n")
    code, _, err = run("generate", "--model", folder, "--input", source, "--output", output)
    assert (code, err) == (0, "answered 1 lines\n")
    assert json.loads(output.read_text())["text"] == expected(made, {"max_iterations": 0}).text


def test_file_options(run, folder, tmp_path):
    source = tmp_path / "in.jsonl"
    for options, message, status in (
        (("--input", source), "--input needs --output", 1),
        (("--input", source, "--output", tmp_path / "out", "--seed", 1), "seed: with --input", 1),
        (("--ray", 2, QUESTION), "--ray needs --input", 2),
        ((), "give a prompt", 2),
    ):
        code, _, err = run("generate", "--model", folder, *options)
        assert code == status
        assert message in err


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_unknown_words(command, run, folder):
    _, _, err = run(command, "--model", folder, *LOOP, "Tom xyzzy Sam")
    assert re.search(r"does not know [1-9]\d* of the \d+ tokens of the prompt", err)
    _, _, err = run(command, "--model", folder, *LOOP, QUESTION)
    assert "does not know" not in err


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_invalid_unicode(command, run, folder):
    code, _, err = run(command, "--model", folder, *LOOP, "Tom \udcff")
    assert code == 1
    assert err.startswith("slr: prompt is not valid Unicode")
