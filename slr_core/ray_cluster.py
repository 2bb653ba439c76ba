"""The Ray cluster of the commands that have ``--ray``. Needs the extra ``ray``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from slr_core.errors import EngineError, SLRError


def connect(device: str = "auto") -> int:
    """Connect to the cluster of ``RAY_ADDRESS``, or start Ray on this machine.

    Args:
        device: that each worker asks for.

    Returns:
        The number of GPUs for each worker: 1 if the cluster has any, unless the device is the CPU.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    has_gpus = bool(ray.cluster_resources().get("GPU"))  # type: ignore[no-untyped-call]
    return int(has_gpus and device != "cpu")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Raises errors of workers as they were raised there.

    Raises:
        SLRError: the error of ours that a worker raised; for another error, an :class:`EngineError` with its last line.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SLRError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from error
        # The constructor of a worker failed: Ray has its traceback as text.
        raise EngineError(f"a worker on the cluster failed: {str(error).strip().splitlines()[-1]}") from error
