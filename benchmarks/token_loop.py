"""Figures of the workspace `token` for `python -m benchmarks.engine`: every token loops.

The model is the random Llama of `benchmarks/workload.py` with T = 4, `feedback: raw` and an adapter of rank 16 per
iteration; its weights are packed, as `slr-serve` packs them, for the engine and for what it is compared with. 40
requests have prompts of 4 tokens and answers of 17 to 48: prompts run all 4 iterations, whatever their answers do, and
writing is measured here. At half depth, a request's tokens exit at 1, 2 or 3 iterations, 2 in the mean; tokens per
second are those while all 32 slots are taken, of 40 requests at full depth and of 48 at half.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch

from benchmarks.figures import Figure, best
from benchmarks.passes import record_passes, run_bare
from benchmarks.workload import ROWS, EndlessReasoner, load
from slr_core import LatentReasoner
from slr_core.checkpoint.info import describe_model
from slr_core.engine import Engine
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.linear import pack_linears
from slr_core.engine.statistics import StepStats
from slr_core.generation.reference import generate
from slr_core.params import ResolvedLoopParams
from slr_core.types import Request

DEPTH, PROMPT, TOKENS, REQUESTS = 4, 4, 48, 40
LOOP = {
    "workspace": "token",
    "feedback": "raw",
    "trained_iterations": DEPTH,
    "max_iterations": DEPTH,
    "projection": {"kind": "identity"},
    "timestep": {"kind": "none"},
    "residual": {"source": "none"},
    "lora": {"rank": 16},
    "halting_head": True,
}


def token_figures(name: str, plain: LatentReasoner, turns: int) -> Iterator[Figure]:
    """The figures.

    Args:
        name: of the model, for the table.
        plain: its base model is used; the loop is another one.
        turns: measurements of each side of a ratio. The ratio of half to full depth is the median of the turns' ratios.
    """
    requests = [replace(x, max_new_tokens=x.max_new_tokens + TOKENS - 32) for x in load(REQUESTS, PROMPT)]
    full = [at_depth(request, DEPTH) for request in requests]
    half = [at_depth(request, 1 + i % (DEPTH - 1)) for i, request in enumerate((2 * full)[: 3 * ROWS // 2])]
    reasoner, steps = looped(plain, "copy"), TokenRecorder()
    pack_linears(reasoner.base)
    with Engine(reasoner, slots=ROWS, capacity=DEPTH * (PROMPT + TOKENS), prefix_gib=0, on_step=steps) as engine:
        answer(engine, full[:1])
        with record_passes(engine) as passes:
            answer(engine, full)
        most = max(rows for rows, _, _ in passes.shapes)
        cache = engine._thread.call(lambda: KVCache(engine.model, most, engine.capacity))
        full_rates: list[float] = []
        half_rates: list[float] = []

        full_s, _, bare_s, packed_s, lockstep_s = best(
            turns,
            lambda: full_rates.append(steps.rate(engine, full)),
            lambda: half_rates.append(steps.rate(engine, half)),
            on_thread(engine, lambda: run_bare(engine, passes.unpacked, passes.heads, cache)),
            on_thread(engine, lambda: run_bare(engine, passes.shapes, passes.heads, cache)),
            on_thread(engine, lambda: generate(engine.reasoner, half[:ROWS])),
        )
    pairs = sorted(half_rate / full_rate for full_rate, half_rate in zip(full_rates, half_rates, strict=True))
    rates = ", ".join(f"{pair:.2f}" for pair in pairs)
    rates = f"{max(full_rates):.1f} tokens/s at full depth, {max(half_rates):.1f} at half; ratios of each turn {rates}"
    yield Figure(
        "`token`: bare passes for the same work / engine",
        name,
        bare_s / full_s,
        "at least 0.85",
        f"{len(full)} requests in {full_s:.2f} s, bare passes {bare_s:.2f} s",
    )
    detail = f"{len(passes.shapes)} passes instead of {len(passes.unpacked)}, {packed_s:.2f} s"
    yield Figure("`token`: the same, with as few bare passes", name, packed_s / full_s, "reported", detail)
    yield Figure("`token`: tokens/s at half depth / full depth", name, median(pairs), "at least 1.6", rates)
    lockstep_rate = sum(request.max_new_tokens for request in half[:ROWS]) / lockstep_s
    detail = f"a lockstep batch of {ROWS}: {lockstep_rate:.1f} tokens/s"
    figure = "`token`: tokens/s, engine / lockstep batch, at half depth"
    yield Figure(figure, name, max(half_rates) / lockstep_rate, "reported", detail)
    yield from memory(name, plain, reasoner)


class TokenRecorder:
    """Records end, rows and tokens of an engine's steps; for ``Engine(on_step=...)``."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int, int]] = []

    def __call__(self, step: StepStats) -> None:
        """Record a step."""
        self.steps.append((time.perf_counter(), step.rows, step.tokens))

    def rate(self, engine: Engine, requests: list[Request]) -> float:
        """Answer the requests; returns tokens per second from the first to the last step in which all slots ran."""
        self.steps.clear()
        answer(engine, requests)
        taken = [i for i, (_, rows, _) in enumerate(self.steps) if rows == ROWS]
        measured = self.steps[taken[0] : taken[-1] + 1]
        return sum(tokens for _, _, tokens in measured[1:]) / (measured[-1][0] - measured[0][0])


def memory(name: str, plain: LatentReasoner, copying: LatentReasoner) -> Iterator[Figure]:
    """Memory of weights and of the key/value caches of 32 requests, against the base model's own."""
    sizes = describe_model(copying)
    weights = sum(x.nbytes for key, x in copying.base.named_parameters() if ".lora_" not in key)
    added = sum(x.nbytes for key, x in copying.named_parameters() if ".lora_" in key or not key.startswith("base."))
    cache = ROWS * (PROMPT + TOKENS) * sizes.cache_bytes_per_position
    for kind, copies, target in (("copy", sizes.cache_copies, "reported"), ("shared", 1, "at most 1.3")):
        looped_bytes = weights + added + copies * cache
        detail = f"{looped_bytes / 2**20:.0f} MiB, {(weights + cache) / 2**20:.0f} MiB"
        figure = f"`token`: memory with `deeper_cache: {kind}` / the un-looped model's"
        yield Figure(figure, name, looped_bytes / (weights + cache), target, detail)


def looped(plain: LatentReasoner, deeper_cache: str) -> LatentReasoner:
    """The base of ``plain`` in a loop of every token; the adapters have an effect."""
    base = type(plain.base)(plain.base.config)
    base.eval()  # type: ignore[no-untyped-call]
    config = plain.config.replace(loop={**LOOP, "deeper_cache": deeper_cache})
    made = EndlessReasoner(base, plain.tokenizer, config).eval()
    with torch.no_grad():
        for key, weight in made.base.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.02)
    return made


def at_depth(request: Request, exit_at: int) -> Request:
    """The request with tokens that exit after ``exit_at`` iterations: any survival is below the threshold."""
    return replace(request, loop=ResolvedLoopParams(DEPTH, exit_at, "survival", 2.0, 1))


def answer(engine: Engine, requests: list[Request]) -> None:
    """Answer requests that arrive at once."""
    for future in [engine.submit(request) for request in requests]:
        future.result()


def on_thread(engine: Engine, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` on the engine's thread."""
    return lambda: engine._thread.call(run)
