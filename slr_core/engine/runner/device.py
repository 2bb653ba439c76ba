"""Choose device, dtype and thread count."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from slr_core.engine.runner.linear import check_quantization, pack_linears
from slr_core.errors import ConfigError
from slr_core.reasoner import LatentReasoner

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by name; the name ``auto`` stands for the checkpoint's own."""
MIN_SPEEDUP = 1.2
"""A larger number of threads is chosen only if a step is faster by this factor."""
MIN_MEASURED_S = 0.25
"""Shortest time in seconds for which thread counts are compared: other processes may be busy at startup."""
_OMP_PAUSE_HARD = 2  # OpenMP 5.0, section 3.2.44
_PROCESS_ID = os.getpid()


def resolve_device(device: str | torch.device = "auto") -> str:
    """Return a device that can be used now. ``auto`` is ``cuda`` if there is a GPU, else ``cpu``.

    Raises:
        ConfigError: the name is unknown or the device is not available.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device}") from error
    try:
        torch.empty(1, device=found).cpu()  # the meta device holds no data: copying from it fails
    except Exception as error:  # each backend raises its own kind
        raise ConfigError(f"device {found} is not available here") from error
    return str(found)


def resolve_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype | None:
    """Return the dtype of this name, ``None`` for ``auto``: the dtype then depends on the checkpoint and the device.

    Raises:
        ConfigError: the name is unknown, or the dtype is not a floating-point one.
    """
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or not found.is_floating_point:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype}")
    return found


def load_reasoner(
    path_or_id: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str = "none",
) -> LatentReasoner:
    """Load a checkpoint onto a device, in eval mode, for inference alone: not to be trained or saved.

    On a CPU its linear layers become :class:`~slr_core.engine.runner.linear.PackedLinear`, which have no gradients.
    Adapters that add nothing are left out.

    Args:
        path_or_id: a folder, a hub id or the name of a bundled checkpoint; ``None``: the default one.
        device: see :func:`resolve_device`.
        dtype: see :func:`resolve_dtype`; ``auto`` is the checkpoint's own where the device computes it natively,
            and fp32 otherwise.
        quantization: ``none``, ``int8`` or ``int4``: how the weights of linear layers are rounded; embeddings, the LM
            head and adapters stay as they are.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the device, the dtype or the quantization cannot be used.
    """
    chosen, place = resolve_dtype(dtype), resolve_device(device)
    check_quantization(quantization, torch.device(place), chosen or torch.float32)
    reasoner = LatentReasoner.from_pretrained(path_or_id, dtype=chosen, device=place, idle_adapters=False)
    if chosen is None:
        cast_for_device(reasoner)
    pack_linears(reasoner.base, check_quantization(quantization, reasoner.device, reasoner.base.dtype))
    return_free_memory()
    return reasoner


def cast_for_device(reasoner: LatentReasoner) -> None:
    """Cast a half-precision model to fp32, in place, if it is on a CPU that does not compute its dtype natively.

    Without AVX512-BF16 or AMX, a matrix product in bf16 takes a CPU 5 to 10 times as long as in fp32.
    """
    half = reasoner.base.dtype in (torch.bfloat16, torch.float16)
    native = reasoner.base.dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if half and reasoner.device.type == "cpu" and not native:
        reasoner.float()


def return_free_memory() -> None:
    """Return memory that has been freed to the operating system. Weights that were converted leave gaps in the heap."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # GNU's C library
        library.malloc_trim(0)


def fastest_threads(run: Callable[[], object], most: int, rounds: int = 3) -> int:
    """Set and return the thread count with which ``run`` is fastest, out of 1, 2, 4, ... and ``most``.

    A larger count has to be faster by :data:`MIN_SPEEDUP`, since it keeps more processors busy. The count applies to
    the calling thread.
    """
    candidates = sorted({min(most, 1 << i) for i in range(most.bit_length() + 1)})
    best = dict.fromkeys(candidates, float("inf"))
    done, start = 0, time.perf_counter()
    while len(candidates) > 1 and (done <= rounds or time.perf_counter() - start < MIN_MEASURED_S):
        for threads in candidates:  # interleaved; the first round warms up
            torch.set_num_threads(threads)
            began = time.perf_counter()
            run()
            best[threads] = min(best[threads], time.perf_counter() - began)
        done += 1
    chosen = candidates[0]
    for threads in candidates[1:]:
        if best[threads] * MIN_SPEEDUP <= best[chosen]:
            chosen = threads
    torch.set_num_threads(chosen)
    if done:
        times = ", ".join(f"{1000 * seconds:.1f} ms with {threads}" for threads, seconds in best.items())
        logger.info("Using %d thread%s (step time: %s)", chosen, "" if chosen == 1 else "s", times)
    return chosen


def restore_default_threads(count: int) -> None:
    """Set the thread count of threads that have not computed yet.

    ``torch.set_num_threads`` sets the count of the calling thread and of all threads that have not computed yet.
    """
    setter = threading.Thread(target=torch.set_num_threads, args=(count,))
    setter.start()
    setter.join()


def release_workers() -> None:
    """End the OpenMP workers of the calling thread. Its next parallel operation starts new ones.

    Every thread that calls torch has its own workers. GNU's OpenMP lets them spin between two parallel regions, but
    only while the process has no more workers than processors. One idle thread that has loaded a model therefore makes
    the workers of all other threads sleep after each operation, and waking them takes longer than most operations of
    a step.
    """
    # A forked process has its parent's list of workers but not the workers: it would wait for them for ever.
    if sys.platform != "linux" or os.getpid() != _PROCESS_ID:
        return
    runtime = ctypes.CDLL(None)
    # Only GNU's OpenMP has this rule; others may end the workers of all threads here.
    if hasattr(runtime, "omp_pause_resource_all") and not hasattr(runtime, "kmp_set_blocktime"):
        runtime.omp_pause_resource_all(_OMP_PAUSE_HARD)
