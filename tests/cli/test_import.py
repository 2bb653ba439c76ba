"""``slr import``."""

import json

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
