"""What the shipped recipes learn, and that the ablations start."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slr_core import tasks
from slr_core.checkpoint.folder import BASE, DEFAULT_CHECKPOINT
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import MethodSettings, get_method
from slr_core.evaluation.run import run_method
from slr_core.evaluation.statistics import summarize
from slr_core.evaluation.sweep import SweepConfig, expand_variants
from slr_core.reasoner import LatentReasoner
from slr_core.training.build import build
from slr_core.training.config import TrainConfig
from slr_core.training.data import Collator, StageStream
from slr_core.training.objectives import Rollout, losses
from slr_core.training.trainer import train

RECIPES = Path(__file__).parents[2] / "configs"
ABLATIONS = sorted(path.stem for path in (RECIPES / "ablations").glob("*.yaml") if path.stem != "base")


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations(name):
    spec = RECIPES / "ablations" / f"{name}.yaml"
    sweep = SweepConfig.from_yaml(spec)
    assert len(sweep.seeds) == 3
    assert [judge.loop.get("max_iterations") for judge in sweep.evaluate] == [6, 24, None]
    assert len(list(expand_variants(sweep, spec.parent))) == 3 * len(sweep.variants) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_of_an_ablation_starts(name):
    spec = RECIPES / "ablations" / f"{name}.yaml"
    for variant in expand_variants(SweepConfig.from_yaml(spec), spec.parent):
        if variant.seed != 0:
            continue
        config = variant.config.model_copy(
            update={"optimizer": variant.config.optimizer.model_copy(update={"batch_size": 4})}
        )
        reasoner = build(config)
        items = next(iter(StageStream(config, first_step=config.total_steps - 1)))
        run = Rollout(reasoner, Collator(reasoner.tokenizer, config)(items), config)
        total = torch.stack([term.value for term in losses(run).values()]).sum()
        total.backward()
        assert total.isfinite()


@pytest.mark.slow
def test_the_first_stage_learns_to_look_up_one_hop(tmp_path):
    options = "{nodes: 8, min_hops: 1, max_hops: 1, balanced: true}"
    first = f"stages=[{{steps: 550, iterations: 1, data: [{{task: prosqa, generator_options: {options}}}]}}]"
    config = TrainConfig.from_yaml(RECIPES / "prosqa.yaml", (first, f"output_dir={tmp_path}", "threads=1"))
    last = json.loads((train(config) / "training.json").read_text())["last_log"]
    # Without looking anything up, the best guess over the concepts of a graph costs about 1.7 nats.
    assert last["chains"] < 1.1
    assert last["start"] < 0.1


@pytest.mark.slow
def test_adapters_on_a_frozen_base_learn_what_the_base_cannot_do(tmp_path):
    config = TrainConfig.from_yaml(RECIPES / "adapters.yaml", (f"output_dir={tmp_path / 'out'}", "threads=1"))
    stage = config.stages[0].model_copy(update={"steps": 120})
    folder = train(config.model_copy(update={"stages": (stage,)}))
    options = dict(stage.data[0].generator_options)
    questions = list(islice(tasks.get_task("prosqa").generate(999, **options), 200))
    backend = Local(LatentReasoner.from_pretrained(str(folder)))
    looped, plain = (
        summarize(
            run_method(get_method(name), backend, tasks.get_task("prosqa"), questions, MethodSettings({}))
        ).accuracy
        for name in ("slr", "no_cot")
    )
    assert plain < 0.62
    assert looped > 0.9
    before, after = (load_file(path / BASE / "model.safetensors") for path in (DEFAULT_CHECKPOINT, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
