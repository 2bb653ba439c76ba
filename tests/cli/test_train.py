import json

import yaml

from tests.training.recipe import DATA


def test_train(run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**DATA, "stages": DATA["stages"][:1]}))
    code, out, err = run("train", path, "--set", f"output_dir={tmp_path / 'out'}", "--set", "seed=9")
    assert code == 0
    assert out.endswith(f"{tmp_path / 'out'}\n")
    assert err.endswith(f"    slr-serve --model {tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["recipe"]["seed"] == 9
