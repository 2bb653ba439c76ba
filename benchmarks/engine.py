"""Speed of the engine, compared with bare forward passes, lockstep batches, the reference and PEFT.

    make bench                      (python -m benchmarks.engine --out benchmarks/results/engine)

Every figure is a ratio of two times. `benchmarks/workload.py` defines the two models and load L.

- Throughput is measured while all 32 slots are taken, in row passes per second (one row in one forward pass), so that
  the end of a run does not matter.
- A lockstep batch of 32 requests runs until its slowest row is done; then the next batch starts.
- Bare passes are the base model's forward passes for the same work, without adapters and without an engine. A bare
  model runs single positions and prompts in separate passes; a second figure uses as few passes as the engine.
- Both sides of a ratio use as many torch threads as the engine finds fastest. What is compared with an engine runs on
  the engine's thread while the engine is idle, because the worker threads of two threads would compete
  (`release_workers`).
- The two sides alternate, and the best time of each counts, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.figures import Figure, best
from benchmarks.passes import PARTS, forward, record_passes, run_bare, time_parts, use_peft_mixed_batch
from benchmarks.token_loop import token_figures
from benchmarks.workload import (
    PROMPT,
    ROWS,
    SEED,
    StepRecorder,
    bundled,
    count_row_passes,
    fixed,
    llama,
    load,
    tokens,
)
from slr_core import LatentReasoner
from slr_core.engine import Engine
from slr_core.engine.runner.device import release_workers
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each side of a ratio")
    parser.add_argument("--threads", type=int, help="maximum number of torch threads (default: torch's default)")
    parser.add_argument("--only", choices=("bundled", "135M", "token"), help="measure one part only")
    parser.add_argument("--layers", type=int, default=30, help="number of layers of the random model")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    threads = options.threads or torch.get_num_threads()
    torch.manual_seed(SEED)
    figures: list[Figure] = []
    shares: dict[str, dict[str, float]] = {}
    used: dict[str, int] = {}
    makers: dict[str, Callable[[], LatentReasoner]] = {"bundled": bundled, "135M": lambda: llama(options.layers)}
    for name, make in makers.items():
        if options.only in (None, name):
            torch.set_num_threads(threads)  # the engine chooses at most as many
            for figure in measure(name, make(), options.turns, shares, used):
                figures.append(figure)
                print(_line(figure), flush=True)
    if options.only in (None, "token"):
        used["token"] = used.get("135M", threads)
        torch.set_num_threads(used["token"])  # the engine chooses at most as many
        for figure in token_figures("135M", llama(options.layers), options.turns):
            figures.append(figure)
            print(_line(figure), flush=True)
    if shares:
        print(*_shares(shares), sep="\n")
    if options.out:
        write(options.out, figures, shares, used)


def measure(
    name: str, reasoner: LatentReasoner, turns: int, shares: dict[str, dict[str, float]], used: dict[str, int]
) -> Iterator[Figure]:
    """The figures of one model. Adds the shares of a step's parts to ``shares`` and its threads to ``used``."""
    large, recorder = name != "bundled", StepRecorder()
    with Engine(reasoner, slots=ROWS, capacity=704, prefix_gib=0, on_step=recorder) as engine:
        engine.submit(fixed(1, 1)).result()
        used[name] = engine.threads
        yield from under_load(name, engine, recorder, turns)
        yield single_request(name, engine, turns)
        if large:
            yield long_prompts(name, engine, recorder, turns)
            if engine.threads > 1:
                yield workers(name, engine, recorder, turns)
        spent = time_parts(engine, lambda: recorder.run(engine, load(2 * ROWS if large else 16 * ROWS)))
        shares[name] = {part: seconds / sum(spent.values()) for part, seconds in spent.items()}
    if large:
        torch.set_num_threads(used[name])
        yield from adapters(name, reasoner, turns)
        yield prefix(name, reasoner, turns)


# -- the figures -----------------------------------------------------------------------------------------


def under_load(name: str, engine: Engine, recorder: StepRecorder, turns: int) -> Iterator[Figure]:
    """The engine under L against bare passes, lockstep batches, single requests, and traced or sampled requests."""
    large = name != "bundled"
    requests = load(4 * ROWS if large else 16 * ROWS)
    traced = [replace(request, trace=True, top_tokens=5, include_states=True) for request in requests]
    # The logits of the random model have a standard deviation of 0.5; with temperature 0.1 it is 5, as usual.
    nucleus = SamplingParams(temperature=0.1 if large else 1.0, top_p=0.9, seed=SEED)
    sampled = [replace(request, sampling=nucleus) for request in requests]
    batches, few = requests[: 2 * ROWS if large else 8 * ROWS], requests[:8]
    with record_passes(engine) as passes:
        recorder.run(engine, requests)
    on_engine_thread = engine._thread.call
    most = max(rows for rows, _, _ in passes.shapes)
    cache = on_engine_thread(lambda: KVCache(engine.model, most, engine.capacity))

    def lockstep() -> None:
        for start in range(0, len(batches), ROWS):
            generate(engine.reasoner, batches[start : start + ROWS])

    def reference() -> None:
        for request in few:
            generate(engine.reasoner, [request])

    row_pass_s: list[float] = []
    ours, bare_s, packed_s, batched, single, recording, sampling = best(
        turns,
        lambda: row_pass_s.append(recorder.run(engine, requests)),
        lambda: on_engine_thread(lambda: run_bare(engine, passes.unpacked, passes.heads, cache)),
        lambda: on_engine_thread(lambda: run_bare(engine, passes.shapes, passes.heads, cache)),
        lambda: on_engine_thread(lockstep),
        lambda: on_engine_thread(reference),
        lambda: recorder.run(engine, traced),
        lambda: recorder.run(engine, sampled),
    )
    fastest = min(row_pass_s)
    rate = f"{1 / fastest:.0f} row passes/s"
    yield Figure(
        "bare passes for the same work / engine under L",
        name,
        bare_s / ours,
        f"at least {0.85 if large else 0.6}",
        f"{len(requests)} requests in {ours:.2f} s, bare passes {bare_s:.2f} s",
    )
    detail = f"{len(passes.shapes)} passes instead of {len(passes.unpacked)}, {packed_s:.2f} s"
    yield Figure("the same, with as few bare passes as the engine's", name, packed_s / ours, "reported", detail)
    detail = f"{rate}, {count_row_passes(batches) / batched:.0f} in lockstep"
    yield Figure(
        "throughput under L / lockstep batches",
        name,
        batched / count_row_passes(batches) / fastest,
        "at least 1.4",
        detail,
    )
    yield Figure(
        f"throughput under L / one at a time, {PROMPT}-token prompts",
        name,
        single / count_row_passes(few) / fastest,
        "at least 4" if large else "reported",
        f"{rate}, {count_row_passes(few) / single:.0f} one at a time",
    )
    yield Figure("under L, every row traced / none", name, recording / ours, "at most 1.15", f"{recording:.2f} s")
    yield Figure(
        "under L, every row sampled, top_p 0.9 / greedy", name, sampling / ours, "reported", f"{sampling:.2f} s"
    )


def long_prompts(name: str, engine: Engine, recorder: StepRecorder, turns: int) -> Figure:
    """Throughput under L with prompts of 128 tokens, against the reference with one request at a time."""
    requests, row_pass_s = load(2 * ROWS, 128), list[float]()

    def reference() -> None:
        for request in requests[:8]:
            generate(engine.reasoner, [request])

    _, single = best(
        min(2, turns),
        lambda: row_pass_s.append(recorder.run(engine, requests)),
        lambda: engine._thread.call(reference),
    )
    reference_rate = count_row_passes(requests[:8]) / single
    detail = f"{1 / min(row_pass_s):.0f} row passes/s, {reference_rate:.0f} one at a time"
    figure = "throughput under L / one at a time, 128-token prompts"
    return Figure(figure, name, 1 / min(row_pass_s) / reference_rate, "reported", detail)


def workers(name: str, engine: Engine, recorder: StepRecorder, turns: int) -> Figure:
    """Throughput under L without and with another thread that keeps its OpenMP workers."""
    requests, ours, beside = load(2 * ROWS), list[float](), list[float]()
    for _ in range(min(2, turns)):
        torch.ones(1_000_000).add_(1)  # starts workers of this thread
        beside.append(recorder.run(engine, requests))
        release_workers()
        ours.append(recorder.run(engine, requests))
    detail = f"{1 / min(ours):.0f} row passes/s, {1 / min(beside):.0f}"
    return Figure(
        "throughput under L without a thread that keeps its OpenMP workers / beside one",
        name,
        min(beside) / min(ours),
        "reported",
        detail,
    )


def single_request(name: str, engine: Engine, turns: int) -> Figure:
    """Latency of a single request against the reference's."""
    request, many = fixed(8, 16), 10 if name == "bundled" else 1
    ours, theirs = best(
        3 * turns * (1 + many // 5),
        lambda: [engine.submit(request).result() for _ in range(many)],
        lambda: engine._thread.call(lambda: [generate(engine.reasoner, [request]) for _ in range(many)]),
    )
    detail = f"{1000 * ours / many:.0f} ms, {1000 * theirs / many:.0f} ms"
    return Figure("latency of a single request / the reference's", name, ours / theirs, "at most 1.05", detail)


def adapters(name: str, reasoner: LatentReasoner, turns: int) -> Iterator[Figure]:
    """A decode or loop pass of 32 rows with 8 different adapters, against no adapters and PEFT's mixed batch."""
    base, width = reasoner.base, 40
    lora_batch, cache, names = LoraBatch(base), KVCache(base, ROWS, width), reasoner.config.loop.adapters
    lora_batch.set_adapters([(base, adapter) for adapter in names])
    lora_batch.tune(ROWS, 1)

    def step(rows: list[int | None]) -> None:
        lora_batch.use(rows)
        forward(lora_batch.model, cache, ROWS, 1, width)

    def peft() -> None:
        with use_peft_mixed_batch(base, [names[row % len(names)] for row in range(ROWS)]):
            forward(base, cache, ROWS, 1, width)

    weights = [weight for layer in lora_batch.layers.values() for weight in layer.weights[:2]]
    with torch.inference_mode():
        ours, none, theirs, reading = best(
            5 * turns,
            lambda: step([row * len(names) // ROWS for row in range(ROWS)]),  # sorted, as the runner's rows
            lambda: step([None] * ROWS),
            peft,
            lambda: [weight.sum() for weight in weights],
        )
    methods = ", ".join(sorted({layer.method for layer in lora_batch.layers.values()}))
    detail = f"{1000 * ours:.0f} ms, {1000 * none:.0f} ms without, {methods}"
    yield Figure("step of 32 rows with 8 adapters / without adapters", name, ours / none, "at most 1.25", detail)
    yield Figure("PEFT's mixed batch / that step", name, theirs / ours, "at least 3", f"{1000 * theirs:.0f} ms")
    added = f"{1000 * (theirs - none):.0f} ms, {1000 * (ours - none):.0f} ms"
    yield Figure(
        "time added by PEFT's mixed batch / by these adapters", name, (theirs - none) / (ours - none), "reported", added
    )
    size = f"{sum(weight.nbytes for weight in weights) / 2**20:.0f} MiB in {1000 * reading:.0f} ms"
    yield Figure(
        "reading the 8 adapters once / time added by these adapters", name, reading / (ours - none), "reported", size
    )


def prefix(name: str, reasoner: LatentReasoner, turns: int) -> Figure:
    """Time to first token with a cached prefix of 512 tokens, against the same without the cache."""
    rng = random.Random(SEED)
    with Engine(reasoner, slots=4, capacity=704, prefix_gib=1) as engine:
        shared = tokens(rng, 512)

        def first(prompt: tuple[int, ...]) -> None:
            engine.submit(replace(fixed(1, 1), prompt_ids=(*prompt, *tokens(rng, PROMPT)))).result()

        first(shared)
        warm, cold = best(turns, lambda: first(shared), lambda: first(tokens(rng, 512)))
    detail = f"{warm:.3f} s warm, {cold:.3f} s cold"
    return Figure("time to first token, 512-token prefix warm / cold", name, warm / cold, "at most 0.3", detail)


# -- the table -------------------------------------------------------------------------------------------


def _line(figure: Figure) -> str:
    return f"| {figure.name} | {figure.model} | {figure.ratio:.2f} | {figure.target} | {figure.detail} |"


def _shares(shares: dict[str, dict[str, float]]) -> list[str]:
    """The table of the parts of a step."""
    return [
        f"| share of the time under L | {' | '.join(shares)} |",
        "|---" * (1 + len(shares)) + "|",
        *(f"| {part} | {' | '.join(f'{model[part]:.0%}' for model in shares.values())} |" for part in PARTS),
    ]


def write(out: Path, figures: list[Figure], shares: dict[str, dict[str, float]], threads: dict[str, int]) -> None:
    """Write the tables as Markdown and JSON."""
    machine = f"{_processor()}, torch {torch.__version__}"
    used = ", ".join(f"{name} {count}" for name, count in threads.items())
    lines = [
        f"`{' '.join(['python -m benchmarks.engine', *sys.argv[1:]])}`, {machine}, threads: {used}",
        "",
        "| figure | model | ratio | target | measured |",
        "|---|---|---|---|---|",
        *map(_line, figures),
        "",
        *([*_shares(shares), ""] if shares else []),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    record = {
        "machine": machine,
        "threads": threads,
        "seed": SEED,
        "figures": [asdict(figure) for figure in figures],
        "shares": shares,
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
