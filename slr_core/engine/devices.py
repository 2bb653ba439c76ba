"""What the hardware at hand does well: where a model goes, in which numbers, and on how many threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from slr_core.base import hidden_size
from slr_core.model import LatentReasoner


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def suit(reasoner: LatentReasoner) -> None:
    """Give a model numbers that its device computes fast: half precision becomes fp32 where a CPU only emulates it.

    Without AVX512-BF16 or AMX, a product in bf16 takes a CPU 5 to 10 times as long as in fp32.
    """
    half = reasoner.base.dtype in (torch.bfloat16, torch.float16)
    native = reasoner.base.dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    if half and reasoner.device.type == "cpu" and not native:
        reasoner.float()


@torch.inference_mode()
def threads_for(base: PreTrainedModel, rows: int) -> int:
    """The number of threads that suits passes of so many single positions; see :func:`fastest_threads`."""
    x = torch.zeros(rows, 1, hidden_size(base), dtype=base.dtype)
    return fastest_threads(lambda: base.base_model(inputs_embeds=x, use_cache=False))


def fastest_threads(run: Callable[[], object], rounds: int = 3) -> int:
    """Of 1, 2, 4, ... threads, at most those that torch has now, the number with which ``run`` is fastest.

    It holds for the calling thread from then on.
    """
    most = torch.get_num_threads()
    candidates = sorted({min(most, 2**i) for i in range(most.bit_length() + 1)})
    if len(candidates) == 1:
        return most
    best: dict[int, float] = {}
    for _ in range(rounds + 1):  # interleaved, and the first round warms up
        for threads in candidates:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            run()
            best[threads] = min(best.get(threads, float("inf")), time.perf_counter() - began)
    chosen = min(best, key=best.__getitem__)
    torch.set_num_threads(chosen)
    return chosen
