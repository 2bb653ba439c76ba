"""The recipe of a run that is resumed."""

from __future__ import annotations

import json

import pytest

from slr_core.errors import ConfigError
from slr_core.training.resume import RECIPE, check_recipe, last_complete, write_recipe
from tests.training.recipe import DATA, recipe

STAGES = DATA["stages"]


def test_same_recipe(tmp_path):
    write_recipe(tmp_path, recipe(output_dir=tmp_path))
    check_recipe(tmp_path, recipe(output_dir=tmp_path / "moved", save_steps=7, log_steps=3, threads=2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, r"seed was 3 when the run was started, the recipe has 4"),
        ({"optimizer": {**DATA["optimizer"], "batch_size": 8}}, r"optimizer\.batch_size was 4 .* has 8"),
        ({"stages": STAGES[:1]}, r"stages was \["),
        ({"stages": [{**STAGES[0], "steps": 50}, *STAGES[1:]]}, r"stages\.0\.steps was \d+ .* has 50"),
        ({"loop": None}, r"loop was \{.* has null"),
        ({"held_out": 5}, r"held_out was 0 .* has 5"),
    ],
)
def test_another_recipe(changes, named, tmp_path):
    write_recipe(tmp_path, recipe(output_dir=tmp_path))
    with pytest.raises(ConfigError, match=named):
        check_recipe(tmp_path, recipe(output_dir=tmp_path, **changes))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_recipe_that_cannot_be_read(content, tmp_path):
    if content is not None:
        (tmp_path / RECIPE).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_recipe(tmp_path, recipe(output_dir=tmp_path))


def test_last_complete(tmp_path):
    assert last_complete(tmp_path) is None
    for step, state in ((9, "{}"), (10, "{}"), (11, "{"), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_recipe_is_json_with_every_default(tmp_path):
    write_recipe(tmp_path, recipe(output_dir=tmp_path))
    settings = json.loads((tmp_path / RECIPE).read_text())
    assert settings["optimizer"]["warmup_steps"] is not None
    assert "output_dir" not in settings
