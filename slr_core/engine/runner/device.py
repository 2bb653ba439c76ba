"""What the hardware at hand does well: where a model goes, in which numbers, and on how many threads."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from slr_core.model.reasoner import LatentReasoner

logger = logging.getLogger(__name__)

WORTH = 1.2
"""How many times as fast more threads have to be."""
MEASURED_S = 0.25
"""Seconds that are measured at least: a machine that starts a server may be busy with more."""
_OMP_PAUSE_HARD = 2  # OpenMP 5.0, section 3.2.44
_PROCESS = os.getpid()


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cast_for_device(reasoner: LatentReasoner) -> None:
    """Give a model numbers that its device computes fast: half precision becomes fp32 where a CPU only emulates it.

    Without AVX512-BF16 or AMX, a product in bf16 takes a CPU 5 to 10 times as long as in fp32.
    """
    half = reasoner.base.dtype in (torch.bfloat16, torch.float16)
    native = reasoner.base.dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if half and reasoner.device.type == "cpu" and not native:
        reasoner.float()


def fastest_threads(run: Callable[[], object], most: int, rounds: int = 3) -> int:
    """Of 1, 2, 4, ... threads, at most ``most``, the number with which ``run`` is fastest.

    More threads have to be worth it, by :data:`WORTH`: they keep processors busy, working or waiting, that others could
    use. The number holds for the calling thread from then on.
    """
    candidates = sorted({min(most, 1 << i) for i in range(most.bit_length() + 1)})
    best = dict.fromkeys(candidates, float("inf"))
    done, start = 0, time.perf_counter()
    while len(candidates) > 1 and (done <= rounds or time.perf_counter() - start < MEASURED_S):
        for threads in candidates:  # interleaved, and the first round warms up
            torch.set_num_threads(threads)
            began = time.perf_counter()
            run()
            best[threads] = min(best[threads], time.perf_counter() - began)
        done += 1
    chosen = candidates[0]
    for threads in candidates[1:]:
        if best[threads] * WORTH <= best[chosen]:
            chosen = threads
    torch.set_num_threads(chosen)
    if done:
        times = ", ".join(f"{threads}: {1000 * seconds:.1f} ms" for threads, seconds in best.items())
        logger.info("a step by number of threads is %s; it runs on %d", times, chosen)
    return chosen


def restore_default_threads(default: int) -> None:
    """Let threads to come compute on so many threads again.

    ``torch.set_num_threads`` sets the number of the calling thread, and that of all that have not computed yet.
    """
    elsewhere = threading.Thread(target=torch.set_num_threads, args=(default,))
    elsewhere.start()
    elsewhere.join()


def release_workers() -> None:
    """End the OpenMP workers that the calling thread has; when it computes in parallel again, it gets others.

    Every thread that calls torch has workers of its own. GNU's OpenMP lets them spin between two parallel regions, but
    only while all of them together are no more than the processors: one idle thread that has once loaded a model makes
    another's workers sleep after each operation, and waking them takes longer than most operations of a step.
    """
    # A forked process has the record of its parent's workers but not them, and would wait for ever for them to end.
    if sys.platform != "linux" or os.getpid() != _PROCESS:
        return
    runtime = ctypes.CDLL(None)
    # Other runtimes have no such rule, and may take this for all threads at once.
    if hasattr(runtime, "omp_pause_resource_all") and not hasattr(runtime, "kmp_set_blocktime"):
        runtime.omp_pause_resource_all(_OMP_PAUSE_HARD)
