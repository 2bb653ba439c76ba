import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slr_core.errors import ConfigError
from slr_core.generation import generate
from slr_core.model import LatentReasoner
from slr_core.training.trainer import MANIFEST, build, train
from tests import tiny
from tests.training.recipe import DATA, recipe

QUESTION = "Tom is a rompus. Every rompus is a lempus. Sam is a impus. Is Tom a impus or lempus?"
STAGES = [{**DATA["stages"][0], "steps": 1}, {**DATA["stages"][1], "steps": 2}]


def weights(folder):
    return {
        f"{path.relative_to(folder)}/{key}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        if "steps" not in path.relative_to(folder).parts
        for key, tensor in load_file(path).items()
    }


def test_building_is_reproducible_from_the_seed():
    first, again, other = build(recipe()), build(recipe()), build(recipe(seed=4))
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in first.state_dict().items())
    assert any(not torch.equal(x, other.state_dict()[key]) for key, x in first.state_dict().items())
    assert first.config.loop == recipe().loop
    assert first.config.text == recipe().text


@pytest.mark.parametrize("changes", [{}, {"max_iterations": 0}, {"chains": 0}], ids=["loop", "control", "no-chains"])
def test_a_recipe_becomes_a_checkpoint(changes, tmp_path):
    folder = train(recipe(output_dir=tmp_path / "out", stages=STAGES, **changes))
    assert folder == tmp_path / "out"
    trained = LatentReasoner.from_pretrained(str(folder))
    fresh = build(recipe()).state_dict()
    moved = {key for key, tensor in trained.state_dict().items() if not torch.equal(tensor, fresh[key])}
    assert any("embed_tokens" in key for key in moved)
    looped = {key for key in moved if "lora_" in key or not key.startswith("base.")}
    assert bool(looped) == (changes != {"max_iterations": 0})
    (result,) = generate(trained, [tiny.request(trained, QUESTION)])
    assert result.token_ids

    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["steps"] == 3
    assert manifest["graphs"] == 12
    assert manifest["recipe"]["seed"] == 3
    assert "output_dir" not in manifest["recipe"]
    assert set(manifest["versions"]) >= {"slr", "torch", "transformers", "python"}
    assert str(tmp_path) not in json.dumps(manifest)


def test_a_resumed_run_ends_where_a_straight_one_does(tmp_path):
    straight = train(recipe(output_dir=tmp_path / "straight", save_steps=3))
    resumed = tmp_path / "resumed"
    (resumed / "steps").mkdir(parents=True)
    shutil.copytree(straight / "steps" / "checkpoint-3", resumed / "steps" / "checkpoint-3")
    train(recipe(output_dir=resumed, save_steps=3), resume=True)
    assert json.loads((resumed / MANIFEST).read_text())["steps"] == 6
    expected, actual = weights(straight), weights(resumed)
    halfway = weights(straight / "steps" / "checkpoint-3")
    assert expected.keys() == actual.keys() == halfway.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    assert any((tensor - halfway[key]).abs().max() > 1e-3 for key, tensor in expected.items())


def test_steps_can_be_served(tmp_path):
    folder = train(recipe(output_dir=tmp_path / "out", stages=STAGES, save_steps=2))
    step = LatentReasoner.from_pretrained(str(folder / "steps" / "checkpoint-2"))
    (result,) = generate(step, [tiny.request(step, QUESTION)])
    assert result.token_ids


def test_the_same_recipe_gives_the_same_weights(tmp_path):
    first, again = (train(recipe(output_dir=tmp_path / name, stages=STAGES)) for name in ("a", "b"))
    expected, actual = weights(first), weights(again)
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: (folder / "steps").mkdir(parents=True)])
def test_there_must_be_something_to_resume(prepare, tmp_path):
    prepare(tmp_path / "out")
    with pytest.raises(ConfigError, match="resume"):
        train(recipe(output_dir=tmp_path / "out", stages=STAGES), resume=True)
