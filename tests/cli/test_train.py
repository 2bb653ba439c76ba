import json
import shlex

import pytest
import yaml

from tests.training.recipe import DATA

COLOURS = [
    {"question": f"The {thing} is {colour}. What colour is the {thing}?", "answer": colour}
    for thing in ("mug", "hat", "kite", "boat")
    for colour in ("red", "blue", "green")
]
RECIPE = {
    "base": {**DATA["base"], "tokenizer": "words"},
    "optimizer": DATA["optimizer"],
    "text": {"max_new_tokens": 3},
    "loop": {"trained_iterations": 2, "max_iterations": 2, "lora": {"rank": 2}},
    "held_out": 3,
    "log_steps": 2,
    "stages": [{"steps": 3, "iterations": 2, "data": [{"task": "text", "file": "colours.jsonl"}]}],
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write a recipe with changes, in the working directory; its questions lie beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in COLOURS))

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, "output_dir": "out", **changes}))
        return "recipe.yaml"

    return write


def test_train(run, recipe, tmp_path):
    """The loss while it trains, the folder at the end, the commands that come next, which work."""
    code, out, err = run("train", recipe(), "--set", "seed=9")
    assert (code, out) == (0, "out\n"), err
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["step 2 of 3", "step 3 of 3"]
    assert "loss " in lines[0]
    assert lines[0].endswith(" left")
    assert int(lines[0].partition(" steps/s, ")[2].partition(" tokens/s")[0]) > 0
    assert lines[2].startswith("held-out questions, text: ")
    assert lines[3:] == [
        "Next:",
        "    slr eval --model out --task text --data out/held_out_text.jsonl",
        "    slr serve --model out",
    ]
    manifest = json.loads((tmp_path / "out" / "training.json").read_text())
    assert manifest["recipe"]["seed"] == 9
    assert manifest["command"] == "slr train recipe.yaml --set seed=9"
    code, out, _ = run(*shlex.split(lines[4])[1:], "--json")
    assert (code, json.loads(out)["overall"]["questions"]) == (0, 3)


def test_card(run, recipe, tmp_path):
    assert run("train", recipe())[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((tmp_path / "out" / "training.json").read_text())
    (data,), (held_out,) = manifest["data"], manifest["held_out"]
    assert f"{held_out['right']} of 3 right" in card
    assert f"{held_out['converged']:.1%} of the loops converged" in card
    assert f"text, colours.jsonl, 3 of 12 held out, SHA-256 `{data['sha256']}`" in card
    assert f"loss {manifest['last_log']['loss']:.4g}" in card
    for words in (
        "| base | random weights",
        "| steps | 3 of 4 questions each, seed 0 |",
        "slr train recipe.yaml",
        "in the folder that holds `out`",
    ):
        assert words in card
    described = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(described) == {**RECIPE, "output_dir": "runs/out"}


def write(name, text):
    def spoil(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"stages": [{**RECIPE["stages"][0], "data": [{"task": "text", "file": name}]}]}

    return spoil


LONG = json.dumps({"question": "red " * 200, "answer": "red"})
FAULTS = {
    "no-value": (lambda _: {"stages": [{"steps": 1, "iterations": 1, "data": [{"file": None}]}]}, "file has no value"),
    "missing": (
        lambda _: {"stages": [{"steps": 1, "iterations": 1, "data": [{"task": "text", "file": "x.jsonl"}]}]},
        "cannot read x.jsonl: No such file",
    ),
    "not-json": (write("bad.jsonl", "word"), "bad.jsonl, line 1: not a JSON object"),
    "no-answer": (write("bad.jsonl", '{"question": "q"}'), "bad.jsonl, line 1: no field 'answer'"),
    "empty-question": (write("bad.jsonl", '{"question": "", "answer": "a"}'), "question 1, task text: the question is"),
    "not-text": (write("bad.jsonl", b"\xff\xfe"), "cannot read bad.jsonl"),
    "nothing": (write("bad.jsonl", ""), "bad.jsonl: no questions"),
    "too-long": (write("bad.jsonl", LONG + "\n" + json.dumps(COLOURS[0])), "do not fit: with 2 iterations"),
    "folder": (
        lambda _: {"stages": [{"steps": 1, "iterations": 1, "data": [{"task": "text", "file": "."}]}]},
        "cannot read .: Is a directory",
    ),
    "misfit": (
        lambda _: {
            "stages": [
                {"steps": 1, "iterations": 1, "data": [{"task": t, "file": "colours.jsonl"}]} for t in ("arithmetic",)
            ]
        },
        "task arithmetic: not an arithmetic question",
    ),
    "all-held-out": (lambda _: {"held_out": 12}, "held_out must be below its 12 different questions"),
    "output": (lambda _: {"output_dir": "colours.jsonl/out"}, "output_dir: colours.jsonl/out cannot be written"),
    "nothing-to-train": (lambda _: {"train": "adapters", "max_iterations": 0}, "nothing to train (max_iterations"),
    "nothing-to-train-in-a-stage": (
        lambda _: {"train": "adapters", "stages": [{**RECIPE["stages"][0], "iterations": 0}]},
        "nothing to train (max_iterations, stages.iterations, first_steps)",
    ),
    "base": (lambda _: {"base": {"from": "./nowhere"}}, "./nowhere: no such file or folder"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case, run, recipe, tmp_path):
    """One line, and no output folder is begun."""
    spoil, message = FAULTS[case]
    changes = {"held_out": 0, **spoil(tmp_path)}
    code, out, err = run("train", recipe(**changes))
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
