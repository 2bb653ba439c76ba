import json
import random
import shutil
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slr_core import tasks
from slr_core.checkpoint.write import base_state
from slr_core.errors import CheckpointError, ConfigError, TrainingError
from slr_core.generation.reference import generate
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.base import Example
from slr_core.tasks.sources import fingerprint
from slr_core.training import trainer
from slr_core.training.build import build
from slr_core.training.resume import RUN
from slr_core.training.sources import Listed
from slr_core.training.trainer import BRIDGE, MANIFEST, LoopTrainer, train
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_iterations": 0}, {"chains": 0}, {"bf16": True}, {"base": DATA["base"] | {"model_type": "gpt2"}}],
    ids=["loop", "control", "no-chains", "bf16", "gpt2"],
)
def test_a_recipe_becomes_a_checkpoint(changes, tmp_path):
    folder = train(recipe(output_dir=tmp_path / "out", stages=STAGES, **changes))
    assert folder == tmp_path / "out"
    trained = LatentReasoner.from_pretrained(str(folder))
    fresh = build(recipe(base=changes.get("base", DATA["base"]))).state_dict()
    moved = {key for key, tensor in trained.state_dict().items() if not torch.equal(tensor, fresh[key])}
    assert any("embed_tokens" in key or "wte" in key for key in moved)
    looped = {key for key in moved if "lora_" in key or not key.startswith("base.")}
    assert bool(looped) == (changes != {"max_iterations": 0})
    (result,) = generate(trained, [tiny.request(trained, QUESTION)])
    assert result.token_ids

    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["steps"] == 3
    assert manifest["questions"] == 12
    assert [source["sha256"] for source in manifest["data"]] == [None, None]
    assert {"loss", "grad_norm", "answer"} <= manifest["last_log"].keys()
    assert ("state_norm" in manifest["last_log"]) == (changes != {"max_iterations": 0})
    assert manifest["recipe"]["seed"] == 3
    assert "output_dir" not in manifest["recipe"]
    assert set(manifest["versions"]) >= {"slr", "torch", "transformers", "python"}
    assert str(tmp_path) not in json.dumps(manifest)
    kind = {"gpt2": "a GPT-2", "llama": "a Llama"}[trained.base.config.model_type]
    assert f"random weights, {kind} with 1 layers" in (folder / "README.md").read_text()


def resumable(straight, step, folder):
    """A copy of a run as it was when it was killed after a checkpoint."""
    (folder / "steps").mkdir(parents=True)
    shutil.copytree(straight / "steps" / f"checkpoint-{step}", folder / "steps" / f"checkpoint-{step}")
    shutil.copy(straight / "steps" / RUN, folder / "steps")
    return folder


@pytest.mark.parametrize("dropout", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_ends_where_a_straight_one_does(dropout, tmp_path):
    changes = {"save_steps": 3}
    if dropout:
        base = build(recipe(base=DATA["base"] | {"model_type": "gpt2"}))
        base.base.config.resid_pdrop = base.base.config.embd_pdrop = 0.2
        base.save_pretrained(str(tmp_path / "base"))
        changes["base"] = {"from": str(tmp_path / "base")}
    straight = train(recipe(output_dir=tmp_path / "straight", **changes))
    resumed = resumable(straight, 3, tmp_path / "resumed")
    train(recipe(output_dir=resumed, **changes), resume=True)
    assert json.loads((resumed / MANIFEST).read_text())["steps"] == 6
    expected, actual = weights(straight), weights(resumed)
    halfway = weights(straight / "steps" / "checkpoint-3")
    assert expected.keys() == actual.keys() == halfway.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    assert any((tensor - halfway[key]).abs().max() > 1e-3 for key, tensor in expected.items())


def test_a_run_is_not_resumed_with_other_questions(tmp_path):
    file, lines = tmp_path / "q.jsonl", [json.dumps({"question": f"a {i}?", "answer": "b"}) for i in range(9)]
    stages = [{"steps": 2, "iterations": 2, "data": [{"task": "text", "file": str(file)}]}]
    changes = {"stages": stages, "objectives": {"answer": 1.0}, "save_steps": 1}
    file.write_text("\n".join(lines))
    straight = train(recipe(output_dir=tmp_path / "straight", **changes))
    resumed = resumable(straight, 1, tmp_path / "resumed")
    file.write_text("\n".join(reversed(lines)))
    with pytest.raises(ConfigError, match=r'cannot be resumed: questions\.\S*q\.jsonl was "\w+" when it was started'):
        train(recipe(output_dir=resumed, **changes), resume=True)


def test_a_run_is_not_resumed_with_another_base(tmp_path):
    """In the same folder: its text settings and its dropout are no part of the recipe."""
    base = build(recipe(base=DATA["base"] | {"model_type": "gpt2"}))
    base.save_pretrained(str(tmp_path / "base"))
    changes = {"base": {"from": str(tmp_path / "base")}, "text": None, "stages": STAGES, "save_steps": 1}
    straight = train(recipe(output_dir=tmp_path / "straight", **changes))
    for i, (file, name, old, new) in enumerate(
        [("slr_config.json", "max_new_tokens", 6, 7), ("base/config.json", "embd_pdrop", 0.0, 0.5)]
    ):
        path = tmp_path / "base" / file
        before = path.read_text()
        assert f'"{name}": {old}' in before
        path.write_text(before.replace(f'"{name}": {old}', f'"{name}": {new}'))
        resumed = resumable(straight, 2, tmp_path / f"resumed_{i}")
        with pytest.raises(ConfigError, match=rf"model\.\w+\.{name} was {old} when it was started and is {new} now"):
            train(recipe(output_dir=resumed, **changes), resume=True)
        path.write_text(before)


def test_a_run_that_came_and_went_meanwhile_is_kept(tmp_path, monkeypatch):
    """The folder was empty when the second run began to build its model."""
    out = tmp_path / "out"

    def build_slowly(config):
        monkeypatch.undo()
        train(recipe(output_dir=out, stages=STAGES))
        return build(config)

    monkeypatch.setattr(trainer, "build", build_slowly)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(recipe(output_dir=out, stages=STAGES, seed=4))
    assert json.loads((out / "steps" / RUN).read_text())["recipe"]["seed"] == 3
    assert json.loads((out / MANIFEST).read_text())["recipe"]["seed"] == 3


def test_intervals_may_change(tmp_path):
    straight = train(recipe(output_dir=tmp_path / "straight", save_steps=3))
    resumed = resumable(straight, 3, tmp_path / "resumed")
    train(recipe(output_dir=resumed, save_steps=1, log_steps=1), resume=True)
    assert {path.name for path in (resumed / "steps").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    state = json.loads((resumed / "steps" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4, 5, 6]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    return train(recipe(output_dir=tmp_path_factory.mktemp("run") / "out", stages=STAGES, save_steps=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.pt", b"PK\x03\x04"),
        ("guard.json", b"{}"),
        *(
            pytest.param(name, b"", marks=pytest.mark.slow)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "guard.json")
        ),
    ],
)
def test_damaged_checkpoint(name, content, three_steps, tmp_path):
    resumed = resumable(three_steps, 2, tmp_path / "resumed")
    (resumed / "steps" / "checkpoint-2" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: not a complete checkpoint .*delete this folder"):
        train(recipe(output_dir=resumed, stages=STAGES, save_steps=1), resume=True)


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoopTrainer, "_save", full)
    with pytest.raises(TrainingError, match=r"steps: cannot be written \(.*No space left.*--resume"):
        train(recipe(output_dir=tmp_path / "out", stages=STAGES, save_steps=1))


def test_damaged_bridge(tmp_path):
    """The teacher's projection is read as the weights of a checkpoint are."""
    bridge = torch.nn.Linear(2, 3, bias=False)
    trainer = SimpleNamespace(reasoner=tiny.reasoner(), _loss_module=lambda: SimpleNamespace(bridge=bridge))
    trainer.reasoner.save_pretrained(str(tmp_path))

    def load(**tensors):
        save_file(tensors, tmp_path / BRIDGE)
        LoopTrainer._load_from_checkpoint(trainer, str(tmp_path))

    load(weight=torch.full((3, 2), 0.5))
    assert bridge.weight.eq(0.5).all()
    for bad in ({"weight": torch.zeros(2, 2)}, {"weight": torch.full((3, 2), torch.nan)}, {"x": torch.zeros(3, 2)}):
        with pytest.raises(CheckpointError, match=BRIDGE):
            load(**bad)
    (tmp_path / BRIDGE).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        LoopTrainer._load_from_checkpoint(trainer, str(tmp_path))


def test_steps_can_be_served(tmp_path):
    folder = train(recipe(output_dir=tmp_path / "out", stages=STAGES, save_steps=2))
    step = LatentReasoner.from_pretrained(str(folder / "steps" / "checkpoint-2"))
    (result,) = generate(step, [tiny.request(step, QUESTION)])
    assert result.token_ids


def test_the_same_recipe_gives_the_same_weights(tmp_path):
    first, again = (train(recipe(output_dir=tmp_path / name, stages=STAGES)) for name in ("a", "b"))
    expected, actual = weights(first), weights(again)
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


def test_sharded_run_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="sharded"):
        train(recipe(output_dir=tmp_path / "out", stages=STAGES), resume=True)


@pytest.mark.slow
def test_killed_before_first_checkpoint(tmp_path):
    straight = train(recipe(output_dir=tmp_path / "straight", stages=STAGES))
    partial = tmp_path / "resumed" / "steps" / "checkpoint-2"
    partial.mkdir(parents=True)
    (partial / "trainer_state.json").write_text('{"global_step": 2, "log_hist')
    shutil.copy(straight / "steps" / RUN, tmp_path / "resumed" / "steps")
    resumed = train(recipe(output_dir=tmp_path / "resumed", stages=STAGES), resume=True)
    expected, actual = weights(straight), weights(resumed)
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir: .* is not empty, it holds README\.md"):
        train(recipe(output_dir=tmp_path, stages=STAGES))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_iterations_that_no_stage_has_are_told(tmp_path, capsys):
    train(recipe(output_dir=tmp_path / "short", stages=STAGES[:1]))
    assert "iterations 3 to 4 of the loop are not trained: no stage has more than 2" in capsys.readouterr().err
    assert "trained for 2 iterations, at most 4" in (tmp_path / "short" / "README.md").read_text()


def test_an_objective_without_effect_is_told_once(tmp_path, capsys):
    train(recipe(output_dir=tmp_path / "short", stages=[{**STAGES[0], "steps": 4}]))
    told = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert told == [
        "objectives.fixed_point has had no effect so far: it is the relative change of states in iterations after the "
        "last needed one"
    ]


def test_a_finished_run_is_neither_overwritten_nor_trained_again(tmp_path, capsys):
    done = train(recipe(output_dir=tmp_path / "out", stages=STAGES))
    before = weights(done)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(recipe(output_dir=tmp_path / "out", stages=STAGES))
    card = (done / "README.md").stat().st_mtime_ns
    train(recipe(output_dir=tmp_path / "out", stages=STAGES), resume=True)
    assert "is finished" in capsys.readouterr().err
    assert (done / "README.md").stat().st_mtime_ns == card
    (done / MANIFEST).unlink()
    again = weights(train(recipe(output_dir=tmp_path / "out", stages=STAGES), resume=True))
    assert all(torch.equal(tensor, again[key]) for key, tensor in before.items())


# -- where a run starts, and what it trains ----------------------------------------------------------------


def own(reasoner):
    """The base model's own weights, the embeddings apart."""
    state = base_state(reasoner.base)
    embeddings = {key for key in state if "embed_tokens" in key or "lm_head" in key}
    return {key: value for key, value in state.items() if key not in embeddings}, {
        key: state[key] for key in embeddings
    }


@pytest.mark.parametrize("kind", ["adapters", "adapters_and_embeddings"])
def test_a_frozen_base_stays_as_it_is_to_the_last_bit(kind, tmp_path):
    start = build(recipe())
    trained = LatentReasoner.from_pretrained(str(train(recipe(output_dir=tmp_path / "out", stages=STAGES, train=kind))))
    (base, embeddings), (base_after, embeddings_after) = own(start), own(trained)
    assert base
    assert all(torch.equal(value, base_after[key]) for key, value in base.items())
    moved = any(not torch.equal(value, embeddings_after[key]) for key, value in embeddings.items())
    assert moved == (kind == "adapters_and_embeddings")
    loops = [key for key in start.state_dict() if "lora_B" in key or not key.startswith("base.")]
    assert all(not torch.equal(start.state_dict()[key], trained.state_dict()[key]) for key in loops)


def test_a_run_starts_from_a_base_model_or_from_a_latent_reasoner(tmp_path):
    first = train(recipe(output_dir=tmp_path / "first", stages=STAGES))
    made = LatentReasoner.from_pretrained(str(first))
    on = {"objectives": {"answer": 1.0}, "stages": STAGES}
    # Its loop goes on ...
    follow = build(recipe(base={"from": str(first)}, loop=None, text=None, **on))
    assert follow.config.loop == made.config.loop
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in follow.state_dict().items())
    # ... or a new one is put around its base ...
    block = {"workspace": "block", "block_size": 3, "lora": {"rank": 2}}
    anew = build(recipe(base={"from": str(first)}, loop=block, **on))
    assert anew.config.loop.workspace == "block"
    assert all(
        torch.equal(x, y) for x, y in zip(base_state(anew.base).values(), base_state(made.base).values(), strict=True)
    )
    # ... or around any causal language model.
    tiny.base("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    plain = build(recipe(base={"from": str(tmp_path / "gpt2")}, loop={"lora": {"rank": 2}}, **on))
    assert plain.base.config.model_type == "gpt2"
    trained = train(recipe(base={"from": str(first)}, loop=block, output_dir=tmp_path / "second", **on))
    assert LatentReasoner.from_pretrained(str(trained)).config.loop.workspace == "block"


def test_the_loop_of_a_checkpoint_must_suit_the_objectives(tmp_path):
    tiny.reasoner(loop={"workspace": "block", "block_size": 3}).save_pretrained(str(tmp_path / "block"))
    with pytest.raises(ConfigError, match=r"objectives\.chains must be 0"):
        build(recipe(base={"from": str(tmp_path / "block")}, loop=None))


def test_a_base_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        build(recipe(base={"from": str(tmp_path / "nowhere")}))
    with pytest.raises(CheckpointError, match=r"base\.tokenizer"):
        build(recipe(base={**DATA["base"], "tokenizer": str(tmp_path / "nowhere")}))


def file_stage(path, **changes):
    return {"steps": 3, "iterations": 2, "data": [{"task": "state_tracking", "file": str(path)}], **changes}


def test_a_file_of_any_task_trains_a_model_with_words_of_its_own(tmp_path):
    examples = list(islice(tasks.get_task("state_tracking").generate(0, elements=3, length=2), 10))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(example.to_json()) + "\n" for example in examples))
    base = {**DATA["base"], "tokenizer": "words"}
    config = recipe(base=base, objectives={"answer": 1.0}, stages=[file_stage(path)], output_dir=tmp_path / "out")
    folder = train(config)
    reasoner = LatentReasoner.from_pretrained(str(folder))
    for example in examples:
        assert reasoner.tokenizer.decode(reasoner.tokenizer(example.question).input_ids) == example.question
    (source,) = json.loads((folder / MANIFEST).read_text())["data"]
    assert source["sha256"] == fingerprint(tuple(examples))
    assert str(tmp_path) not in source["source"]


def test_a_file_is_gone_through_again_and_again(tmp_path):
    examples = [Example("x" * (i % 7 + 1) + f"{i}", (), "y") for i in range(20)]
    source = Listed(examples, 0, "", "")
    epochs = [[source.draw(step, 6, random.Random(0)) for step in range(3 * e, 3 * e + 3)] for e in range(4)]
    orders = [[example.question for batch in epoch for example in batch] for epoch in epochs]
    for order in orders:
        assert len(order) == len(set(order)) == 18
    assert len({tuple(order) for order in orders}) == 4
    assert len({question for order in orders for question in order}) == 20
    assert len(list(Listed(examples[:2], 0, "", "").draw(5, 6, random.Random(0)))) == 6


# -- stages and divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        pytest.param(float("nan"), "the loss was not finite at step 22", marks=pytest.mark.slow),
        (1e4, "the loss has exploded: .* at step 24"),
    ],
)
def test_diverged_run_keeps_good_checkpoint(factor, said, tmp_path, monkeypatch):
    real = LoopTrainer.training_step

    def poisoned(self, model, inputs, *others):
        if self.state.global_step == 22:
            with torch.no_grad():
                self.reasoner.base.get_input_embeddings().weight.mul_(factor)
        return real(self, model, inputs, *others)

    monkeypatch.setattr(LoopTrainer, "training_step", poisoned)
    stages = [{**STAGES[0], "steps": 30}]
    with pytest.raises(TrainingError, match=rf"{said}.*; the last checkpoint in .* is kept"):
        train(recipe(output_dir=tmp_path / "out", save_steps=1, stages=stages, guard={"patience": 3}))
    # None while the loss was above its bound, although these weights were finite.
    kept = sorted(path.name for path in (tmp_path / "out" / "steps").glob("checkpoint-*"))
    assert kept == ["checkpoint-21", "checkpoint-22"]
    LatentReasoner.from_pretrained(str(tmp_path / "out" / "steps" / "checkpoint-22"))
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_batch_is_cut_into_equal_passes(tmp_path):
    optimizer = {**DATA["optimizer"], "accumulate": 3}
    with pytest.raises(ConfigError, match="batch_size must be a multiple of 3"):
        train(recipe(output_dir=tmp_path / "out", optimizer=optimizer))
    folder = train(recipe(output_dir=tmp_path / "two", stages=STAGES, optimizer={**optimizer, "accumulate": 2}))
    assert json.loads((folder / MANIFEST).read_text())["steps"] == 3
