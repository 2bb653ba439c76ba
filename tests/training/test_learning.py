"""Whether the shipped recipe learns what its first stage is there for."""

import json
from pathlib import Path

import pytest

from slr_core.training.config import TrainConfig
from slr_core.training.trainer import train

RECIPE = Path(__file__).parents[2] / "configs" / "prosqa.yaml"


@pytest.mark.slow
def test_the_first_stage_learns_to_look_up_one_hop(tmp_path):
    first = "stages=[{steps: 550, iterations: 1, graphs: [{nodes: 8, min_hops: 1, max_hops: 1, balanced: true}]}]"
    config = TrainConfig.from_yaml(RECIPE, (first, f"output_dir={tmp_path}", "threads=1"))
    losses = json.loads((train(config) / "training.json").read_text())["last_log"]
    # Without looking anything up, the best guess over the concepts of a graph costs about 1.7 nats.
    assert losses["chains"] < 1.1
    assert losses["start"] < 0.1
