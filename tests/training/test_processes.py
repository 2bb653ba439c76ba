"""`slr train` as real processes: killed and resumed, and two that share a batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slr_core.training.trainer import MANIFEST
from tests.training.recipe import DATA, GRAPHS

pytestmark = pytest.mark.slow

FSDP = Path(__file__).parents[2] / "configs/accelerate/fsdp.yaml"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STAGES = [{"steps": 60, "iterations": {"mean": 3, "least": 1, "most": 4}, "backprop": 2, "data": GRAPHS}]


def recipe(folder, **changes):
    path = folder / "recipe.yaml"
    data = {**DATA, "stages": STAGES, "threads": 1, "output_dir": str(folder / "out"), **changes}
    path.write_text(yaml.safe_dump(data))
    return path


def command(path, *options):
    return [sys.executable, "-m", "slr_core.cli", "train", str(path), *options]


def finish(arguments):
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder):
    found = [path for path in sorted(folder.rglob("*.safetensors")) if "steps" not in path.relative_to(folder).parts]
    return {f"{path.relative_to(folder)}/{key}": x for path in found for key, x in load_file(path).items()}


def test_killed_run_resumes_to_same_weights(tmp_path):
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    finish(command(recipe(tmp_path / "straight")))
    path = recipe(tmp_path / "killed", save_steps=7)
    steps = tmp_path / "killed" / "out" / "steps"
    running = subprocess.Popen(command(path), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # In the middle of things: as soon as the third checkpoint appears, finished or not.
    while not (steps / "checkpoint-21").exists() and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "out" / MANIFEST).exists()
    finish(command(path, "--resume"))
    expected, actual = weights(tmp_path / "straight" / "out"), weights(tmp_path / "killed" / "out")
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_interrupted(tmp_path):
    """Ctrl-C reaches every process of the terminal."""
    path = recipe(tmp_path, stages=[{**STAGES[0], "steps": 100_000}], save_steps=1)
    with subprocess.Popen(
        command(path),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # it may be ignored here
    ) as running:
        assert running.stderr is not None
        next(line for line in running.stderr if line.startswith("step "))
        os.killpg(running.pid, signal.SIGINT)
        printed = running.stderr.read()
    assert running.returncode == 130
    assert "Traceback" not in printed
    assert "--resume" in printed.splitlines()[-1]


def logged(folder):
    state = json.loads((folder / "out" / "steps" / "checkpoint-12" / "trainer_state.json").read_text())
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("training", ["full", "adapters", "sharded"])
def test_two_processes_have_the_loss_of_one_with_the_same_batch(training, tmp_path):
    stages = [{**STAGES[0], "steps": 12, "iterations": 4}]
    changes = {"stages": stages, "log_steps": 1, "train": "adapters" if training == "adapters" else "full"}
    config = {**yaml.safe_load(FSDP.read_text()), "num_processes": 2, "use_cpu": True}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29533", "-m", "slr_core.cli", "train"]
    if training == "sharded":
        launch = [
            "accelerate.commands.launch",
            f"--config_file={tmp_path / 'fsdp.yaml'}",
            "--main_process_port=29535",
            *["-m", "tests.training.shard_on_cpu", "train"],
        ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = str(recipe(tmp_path / name, **changes))
        done = finish(command(path) if name == "one" else [sys.executable, "-m", *launch, path])
        assert done.stdout.splitlines()[-1:] == [str(tmp_path / name / "out")], "named by the main process alone"
        assert done.stderr.count("Next:") == 1
    saved = tmp_path / "two" / "out" / "steps" / "checkpoint-12"
    assert training == "sharded" or (saved / "rng_state_1.pth").exists(), "there were two"
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 12
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys() >= {"loss", "answer", "frontier", "chains", "fixed_point"}
        for name in alone.keys() - {"tokens_per_second"}:
            value = alone[name]
            assert shared[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    expected, actual = weights(tmp_path / "one" / "out"), weights(tmp_path / "two" / "out")
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=1e-3, msg=key)
