"""``slr import``."""

import json

import pytest

from tests.checkpoint.importers import published


def test_folder_answers(run, tmp_path):
    made = published.coconut(tmp_path)
    options = ["--base", made.base, "--out", tmp_path / "out"]
    code, out, err = run("import", "coconut", made.checkpoint, *options)
    assert (code, out) == (1, "")
    assert "--latents is needed" in err
    code, out, err = run("import", "coconut", made.checkpoint, *options, "--latents", 3)
    assert (code, err) == (0, "")
    assert "<|start-latent|> 40, <|end-latent|> 41, <|latent|> 42" in out
    assert "3, 3 iterations in every answer" in out
    code, out, _ = run("generate", "--model", tmp_path / "out", "--json", "w1 w2")
    assert (code, json.loads(out)["iterations"]) == (0, 3)


def test_json(run, tmp_path):
    made = published.coconut(tmp_path)
    options = ["--base", made.base, "--latents", 2, "--dtype", "float64", "--json"]
    check = json.loads(run("import", "coconut", made.checkpoint, *options, "--out", tmp_path / "out")[1])
    assert check["markers"] == {"<|start-latent|>": 40, "<|end-latent|>": 41, "<|latent|>": 42}
    assert (check["latents"], check["comparison"]) == (2, None)
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["dtype"] == "float64"


@pytest.mark.slow
def test_proof(run, tmp_path):
    """What the thoughts do and how stable they are past the trained depth, without weights trained for it."""
    made = published.coconut(tmp_path)
    out = tmp_path / "out"
    assert run("import", "coconut", made.checkpoint, "--base", made.base, "--out", out, "--latents", 3)[0] == 0
    questions = [{"question": f"w{i} w{i + 1}", "answer": f"w{i}"} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = ["--model", out, "--task", "text", "--data", tmp_path / "questions.jsonl", "--json"]
    methods = ["slr", "zeroed_thoughts", "shuffled_thoughts", "foreign_thoughts", "paused_thoughts", "no_cot"]
    code, found, err = run("compare", *data, "--methods", ",".join(methods))
    assert (code, err) == (0, "")
    compared = json.loads(found)
    assert (list(compared["figures"]), compared["missing"]) == (methods, {})
    assert [compared["figures"][name]["iterations"] for name in methods] == [3, 3, 3, 3, 3, 0]
    code, found, err = run("stability", *data, "--past", 2)
    assert (code, err) == (0, "")
    assert max(map(int, json.loads(found)["by_depth"])) == 6
