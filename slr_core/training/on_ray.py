"""Training runs side by side on a Ray cluster. Needs the extra ``ray``.

Every run is started, none is stopped early: plain Ray tasks are enough, and Ray Tune's search has nothing to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from slr_core.ray_cluster import connect
from slr_core.training.config import TrainConfig
from slr_core.training.resume import holds_run
from slr_core.training.trainer import train


def train_on_ray(
    configs: Sequence[TrainConfig], cpus: int = 1, progress: Callable[[str], None] = lambda step: None
) -> None:
    """Train all recipes, as many at once as the cluster has room for; interrupted ones continue.

    Args:
        configs: with different output folders, which all machines share.
        cpus: of each run.
        progress: called with the folder of each run that has ended.

    Raises:
        TrainingError: a training failed; the others are stopped, and can be continued.
    """
    run = ray.remote(num_cpus=cpus, num_gpus=connect(), max_retries=0)(_train)
    waiting = [run.remote(config, cpus) for config in configs]
    try:
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            progress(f"trained {ray.get(done)}")
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def _train(config: TrainConfig, cpus: int) -> str:
    import torch

    torch.set_num_threads(cpus)
    train(config, resume=holds_run(Path(config.output_dir) / "steps"))
    return config.output_dir
