"""Where a run starts, and what it must be resumed with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from slr_core.errors import CheckpointError, ConfigError, TrainingError
from slr_core.training.guard import TrainingGuard
from slr_core.training.resume import (
    RUN,
    check_run,
    check_trained,
    claim,
    find_start,
    last_complete,
    reading,
    write_run,
    writing,
)
from slr_core.training.trainer import train
from tests.training.recipe import DATA, recipe

STAGES = DATA["stages"]
STATE = json.dumps({"global_step": 3})
FILES = ("optimizer.pt", "scheduler.pt", "guard.json", "rng_state.pth")


def start(folder, inputs=None, **changes):
    """What a run leaves before its first checkpoint."""
    with claim(folder / "steps"):
        write_run(folder / "steps", recipe(output_dir=folder, **changes), inputs or {})


def save(folder, step, state=STATE, files=FILES):
    """What a checkpoint of a run holds beside the model."""
    checkpoint = folder / "steps" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in files:
        (checkpoint / name).touch()
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def find(folder, *, resume=True, **changes):
    return find_start(folder, recipe(output_dir=folder, **changes), resume=resume)


def test_same_recipe(tmp_path):
    start(tmp_path)
    checkpoint = save(tmp_path, 3)
    assert find(tmp_path, save_steps=7, log_steps=3, threads=2) == checkpoint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, r"resumed: seed was 3 when it was started and is 4 now"),
        ({"optimizer": {**DATA["optimizer"], "batch_size": 8}}, r"optimizer\.batch_size was 4 .* is 8 now"),
        ({"stages": STAGES[:1]}, r"stages was a list of 2 when it was started and is a list of 1 now"),
        ({"stages": [{**STAGES[0], "steps": 50}, *STAGES[1:]]}, r"stages\.0\.steps was \d+ .* is 50 now"),
        ({"loop": None}, r"loop was \{.* is null now"),
        ({"held_out": 5}, r"held_out was 0 .* is 5 now"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_another_recipe(changes, named, saved, tmp_path):
    start(tmp_path)
    if saved:
        save(tmp_path, 3)
    with pytest.raises(ConfigError, match=named):
        find(tmp_path, **changes)


def test_other_data(tmp_path):
    start(tmp_path, {"data": {"text, q.jsonl": "ab"}})
    check_run(tmp_path / "steps", {"data": {"text, q.jsonl": "ab"}})
    with pytest.raises(ConfigError, match=r'data\.text, q\.jsonl was "ab" when it was started and is "cd" now'):
        check_run(tmp_path / "steps", {"data": {"text, q.jsonl": "cd"}})


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[]", b"{}"])
def test_run_that_cannot_be_read(content, tmp_path):
    save(tmp_path, 3)
    if content is not None:
        (tmp_path / "steps" / RUN).write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json, which says .* cannot be read"):
        find(tmp_path)


def test_last_complete(tmp_path):
    steps = tmp_path / "steps"
    assert last_complete(steps) is None
    for step, state in ((9, STATE), (10, STATE), (11, "{"), (12, None), (13, "[]"), (15, "{}")):
        save(tmp_path, step, state)
    (steps / "checkpoint-14.bak").mkdir()
    assert last_complete(steps) == steps / "checkpoint-10"


@pytest.mark.parametrize("lost", FILES)
def test_a_checkpoint_that_lacks_a_file_is_not_complete(lost, tmp_path):
    start(tmp_path)
    save(tmp_path, 6, files=set(FILES) - {lost})
    with pytest.raises(
        ConfigError, match=rf"no checkpoint in .* is complete: checkpoint-6 lacks {lost.partition('.')[0]}"
    ):
        find(tmp_path)
    older = save(tmp_path, 3)
    assert find(tmp_path) == older


def test_killed_before_the_first_checkpoint_was_whole(tmp_path):
    start(tmp_path)
    save(tmp_path, 3, state='{"global_step": 3, "log')
    assert find(tmp_path) is None
    assert find(tmp_path, resume=False) is None


def test_a_finished_model_is_not_replaced(tmp_path):
    """Its checkpoints were deleted, to save room."""
    start(tmp_path)
    (tmp_path / "README.md").touch()
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"is not empty, it holds README\.md"):
            find(tmp_path, resume=resume)


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run was started"):
        find(tmp_path / "out")


def test_a_run_is_not_started_over(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        find(tmp_path, resume=False)


def test_one_process_trains_in_a_folder(tmp_path):
    steps = tmp_path / "steps"
    steps.mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    arguments = [sys.executable, "-c", hold, str(steps / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is training in"), claim(steps):
            pass
        other.kill()
    with claim(steps):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "steps").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        start(tmp_path)


def test_run_file_has_every_default(tmp_path):
    start(tmp_path)
    settings = json.loads((tmp_path / "steps" / RUN).read_text())["recipe"]
    assert settings["optimizer"]["warmup_steps"] is not None
    assert "output_dir" not in settings


def manifest(folder, **changes):
    written = recipe(**changes).model_dump(mode="json", by_alias=True, exclude={"output_dir"}, exclude_none=True)
    (folder / "training.json").write_text(json.dumps({"recipe": written}))
    return folder / "training.json"


def test_finished_model_of_the_same_recipe(tmp_path):
    path = manifest(tmp_path)
    check_trained(path, recipe(output_dir=tmp_path, save_steps=7))
    older = json.loads(path.read_text())
    del older["recipe"]["guard"]  # written by a version without this setting
    path.write_text(json.dumps(older))
    check_trained(path, recipe(output_dir=tmp_path))


def test_finished_model_of_another_recipe(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is trained already: seed was 4 .* is 3 now: use it .*, or delete .* to train anew"
    ):
        check_trained(manifest(tmp_path, seed=4), recipe(output_dir=tmp_path))
    loop = {**DATA["loop"], "lora": {"rank": 4}}
    with pytest.raises(ConfigError, match=r"loop\.lora\.rank was 2 .* is 4 now"):
        check_trained(manifest(tmp_path), recipe(output_dir=tmp_path, loop=loop))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"recipe": {"seed": "x"}}'])
def test_manifest_that_cannot_be_read(content, tmp_path):
    (tmp_path / "training.json").write_bytes(content)
    with pytest.raises(ConfigError, match="not the manifest of a training"):
        check_trained(tmp_path / "training.json", recipe(output_dir=tmp_path))


def test_guard_goes_on_from_its_state():
    limits = recipe().guard.model_copy(update={"loss_factor": 2.0, "patience": 2})

    def guard():
        return TrainingGuard(limits, loss_floor=1.0, gradient_floor=1.0)

    first = guard()
    for step in range(30):
        first.check_loss(1.5, step)
    resumed = guard()
    resumed.restore(json.loads(json.dumps(first.state())))
    resumed.check_loss(9.0, 30)
    assert not resumed.is_stable
    with pytest.raises(TrainingError, match="exploded"):
        resumed.check_loss(9.0, 31)


def test_a_state_of_another_version_of_transformers(tmp_path):
    start(tmp_path)
    save(tmp_path, 3, state=json.dumps({"global_step": 3, "unknown": 1}))
    with pytest.raises(CheckpointError, match=r"checkpoint-3: not a complete checkpoint \(TypeError: .*unknown"):
        train(recipe(output_dir=tmp_path), resume=True)


def test_errors_name_the_folder():
    with (
        pytest.raises(
            CheckpointError, match=r"steps/checkpoint-3: not a complete checkpoint \(EOFError\): delete this"
        ),
        reading("steps/checkpoint-3"),
    ):
        raise EOFError
    # The last kind is that of tokenizers.
    for error in OSError(28, "No space left"), RuntimeError("No space left"), Exception("No space left"):
        with pytest.raises(TrainingError, match=r"out: cannot be written \(.*No space.*\); --resume"), writing("out"):
            raise error
    with pytest.raises(KeyError), writing("out"):
        raise KeyError("bug")
