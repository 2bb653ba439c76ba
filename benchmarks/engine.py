"""What the engine costs and what it gains, every figure a ratio of two times measured side by side.

    make bench                      (python -m benchmarks.engine --out benchmarks/results/engine)

`benchmarks/workload.py` has the two models and load L. Throughput is that of the time in which all 32 slots are taken,
in passes of rows a second: neither side gains from how a run ends. A lockstep batch takes 32 requests of the same load,
loops and writes until its slowest row is done, and makes room for the next. The bound is the time of the bare base
model's passes for the same work: no adapters, no engine, a cache that nothing copies. A bare model runs single
positions and prompts in passes of their own; beside it stands the time with as few passes as the engine has.
Both sides of a ratio run on as many threads as the engine finds fastest, and what is held against an engine runs on its
own thread while it is idle: workers of two threads would get in each other's way (`release_workers`). They take turns,
and the best turn of each counts: a busy machine slows single turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.passes import PARTS, bare, forward, mixed_by_peft, parts, recorded
from benchmarks.workload import PROMPT, ROWS, SEED, Watch, bundled, fixed, llama, load, tokens, work
from slr_core import LatentReasoner
from slr_core.engine import Engine
from slr_core.engine.runner.device import release_workers
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.generation.reference import generate
from slr_core.params import SamplingParams


@dataclass(frozen=True)
class Figure:
    """One line of the table: the ratio of two times, or of two rates, and what it should be."""

    name: str
    model: str
    ratio: float
    bar: str
    detail: str


def main() -> None:
    """Measure everything, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table goes: this path with .md and .json")
    parser.add_argument("--turns", type=int, default=3, help="how often the two sides of a ratio take turns")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--only", choices=("bundled", "135M"), help="one of the models")
    parser.add_argument("--layers", type=int, default=30, help="of the random model, to try things out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    threads = options.threads or torch.get_num_threads()
    torch.manual_seed(SEED)
    figures: list[Figure] = []
    shares: dict[str, dict[str, float]] = {}
    used: dict[str, int] = {}
    makers: dict[str, Callable[[], LatentReasoner]] = {"bundled": bundled, "135M": lambda: llama(options.layers)}
    for name, make in makers.items():
        if options.only in (None, name):
            torch.set_num_threads(threads)  # an engine chooses among so many
            for figure in measure(name, make(), options.turns, shares, used):
                figures.append(figure)
                print(_line(figure), flush=True)
    print(*_shares(shares), sep="\n")
    if options.out:
        write(options.out, figures, shares, used)


def measure(
    name: str, reasoner: LatentReasoner, turns: int, shares: dict[str, dict[str, float]], used: dict[str, int]
) -> Iterator[Figure]:
    """The figures of one model; into ``shares`` where its steps' time goes, into ``used`` on how many threads."""
    large, watch = name != "bundled", Watch()
    with Engine(reasoner, slots=ROWS, capacity=704, prefix_gib=0, on_step=watch) as engine:
        engine.submit(fixed(1, 1)).result()
        used[name] = engine.threads
        yield from under_load(name, engine, watch, turns)
        yield alone(name, engine, turns)
        if large:
            yield long_prompts(name, engine, watch, turns)
            if engine.threads > 1:
                yield workers(name, engine, watch, turns)
        spent = parts(engine, lambda: watch.run(engine, load(2 * ROWS if large else 16 * ROWS)))
        shares[name] = {part: seconds / sum(spent.values()) for part, seconds in spent.items()}
    if large:
        torch.set_num_threads(used[name])
        yield from adapters(name, reasoner, turns)
        yield prefix(name, reasoner, turns)


# -- the figures -----------------------------------------------------------------------------------------


def under_load(name: str, engine: Engine, watch: Watch, turns: int) -> Iterator[Figure]:
    """The engine under L beside the bare passes it made, lockstep batches, one request at a time, and traces."""
    large = name != "bundled"
    requests = load(4 * ROWS if large else 16 * ROWS)
    traced = [replace(request, trace=True, top_tokens=5, include_states=True) for request in requests]
    # A random model's logits spread by a half; so they spread by 5, as a language model's do.
    nucleus = SamplingParams(temperature=0.1 if large else 1.0, top_p=0.9, seed=SEED)
    sampled = [replace(request, sampling=nucleus) for request in requests]
    batches, few = requests[: 2 * ROWS if large else 8 * ROWS], requests[:8]
    with recorded(engine) as passes:
        watch.run(engine, requests)
    on_its_thread = engine._thread.call
    most = max(rows for rows, _, _ in passes.shapes)
    cache = on_its_thread(lambda: KVCache(engine.model, most, engine.capacity))

    def lockstep() -> None:
        for start in range(0, len(batches), ROWS):
            generate(engine.reasoner, batches[start : start + ROWS])

    def reference() -> None:
        for request in few:
            generate(engine.reasoner, [request])

    paces: list[float] = []
    ours, bound, joined, batched, single, recording, sampling = best(
        turns,
        lambda: paces.append(watch.run(engine, requests)),
        lambda: on_its_thread(lambda: bare(engine, passes.unpacked, passes.heads, cache)),
        lambda: on_its_thread(lambda: bare(engine, passes.shapes, passes.heads, cache)),
        lambda: on_its_thread(lockstep),
        lambda: on_its_thread(reference),
        lambda: watch.run(engine, traced),
        lambda: watch.run(engine, sampled),
    )
    pace = min(paces)
    rate = f"{1 / pace:.0f} passes of rows a second"
    yield Figure(
        "bound / engine under L",
        name,
        bound / ours,
        f"at least {0.85 if large else 0.6}",
        f"{len(requests)} requests in {ours:.2f} s, bound {bound:.2f} s",
    )
    detail = f"{len(passes.shapes)} passes, {len(passes.unpacked)} unpacked, bound {joined:.2f} s"
    yield Figure("the same, bound in as few passes as the engine's", name, joined / ours, "reported", detail)
    against = f"{rate}, {work(batches) / batched:.0f} in lockstep"
    yield Figure("throughput under L / lockstep batches", name, batched / work(batches) / pace, "at least 1.4", against)
    yield Figure(
        f"throughput under L / one at a time, {PROMPT}-token prompts",
        name,
        single / work(few) / pace,
        "at least 4" if large else "reported",
        f"{rate}, {work(few) / single:.0f} one at a time",
    )
    yield Figure("under L, every row traced / none", name, recording / ours, "at most 1.15", f"{recording:.2f} s")
    yield Figure(
        "under L, every row sampled, top_p 0.9 / greedy", name, sampling / ours, "reported", f"{sampling:.2f} s"
    )


def long_prompts(name: str, engine: Engine, watch: Watch, turns: int) -> Figure:
    """Throughput under L, but for prompts of 128 tokens, against the reference, one request after the other."""
    requests, paces = load(2 * ROWS, 128), list[float]()

    def reference() -> None:
        for request in requests[:8]:
            generate(engine.reasoner, [request])

    _, single = best(
        min(2, turns),
        lambda: paces.append(watch.run(engine, requests)),
        lambda: engine._thread.call(reference),
    )
    own = work(requests[:8]) / single
    detail = f"{1 / min(paces):.0f} passes of rows a second, {own:.0f} one at a time"
    figure = "throughput under L / one at a time, 128-token prompts"
    return Figure(figure, name, 1 / min(paces) / own, "reported", detail)


def workers(name: str, engine: Engine, watch: Watch, turns: int) -> Figure:
    """What it costs the engine that another thread has computed in parallel and keeps its workers."""
    requests, ours, beside = load(2 * ROWS), list[float](), list[float]()
    for _ in range(min(2, turns)):
        torch.ones(1_000_000).add_(1)  # here, on this thread
        beside.append(watch.run(engine, requests))
        release_workers()
        ours.append(watch.run(engine, requests))
    detail = f"{1 / min(beside):.0f} passes of rows a second, {1 / min(ours):.0f}"
    return Figure(
        "under L, another thread keeps OpenMP workers / it let them go",
        name,
        min(beside) / min(ours),
        "reported",
        detail,
    )


def alone(name: str, engine: Engine, turns: int) -> Figure:
    """A lone request's latency against the reference's."""
    request, many = fixed(8, 16), 10 if name == "bundled" else 1
    ours, theirs = best(
        3 * turns * (1 + many // 5),
        lambda: [engine.submit(request).result() for _ in range(many)],
        lambda: engine._thread.call(lambda: [generate(engine.reasoner, [request]) for _ in range(many)]),
    )
    detail = f"{1000 * ours / many:.0f} ms, {1000 * theirs / many:.0f} ms"
    return Figure("a lone request's latency / the reference's", name, ours / theirs, "at most 1.05", detail)


def adapters(name: str, reasoner: LatentReasoner, turns: int) -> Iterator[Figure]:
    """A decode or loop pass of 32 rows with 8 different adapters, against none and against PEFT's own mixed batch."""
    base, width = reasoner.base, 40
    lora_batch, cache, names = LoraBatch(base), KVCache(base, ROWS, width), reasoner.config.loop.adapters
    lora_batch.set_adapters([(base, adapter) for adapter in names])
    lora_batch.tune(ROWS, 1)

    def step(rows: list[int | None]) -> None:
        lora_batch.use(rows)
        forward(lora_batch.model, cache, ROWS, 1, width)

    def peft() -> None:
        with mixed_by_peft(base, [names[row % len(names)] for row in range(ROWS)]):
            forward(base, cache, ROWS, 1, width)

    weights = [weight for layer in lora_batch.layers.values() for weight in layer.weights[:2]]
    with torch.inference_mode():
        ours, none, theirs, reading = best(
            5 * turns,
            lambda: step([row % len(names) for row in range(ROWS)]),
            lambda: step([None] * ROWS),
            peft,
            lambda: [weight.sum() for weight in weights],
        )
    methods = ", ".join(sorted({layer.method for layer in lora_batch.layers.values()}))
    detail = f"{1000 * ours:.0f} ms, {1000 * none:.0f} ms without, {methods}"
    yield Figure("step with 8 adapters / with none", name, ours / none, "at most 1.25", detail)
    yield Figure("PEFT's mixed batch / that step", name, theirs / ours, "at least 3", f"{1000 * theirs:.0f} ms")
    added = f"{1000 * (theirs - none):.0f} ms, {1000 * (ours - none):.0f} ms"
    yield Figure("what PEFT's adds / what ours adds", name, (theirs - none) / (ours - none), "reported", added)
    size = f"{sum(weight.nbytes for weight in weights) / 2**20:.0f} MiB in {1000 * reading:.0f} ms"
    yield Figure("reading the 8 adapters once / what ours adds", name, reading / (ours - none), "reported", size)


def prefix(name: str, reasoner: LatentReasoner, turns: int) -> Figure:
    """Time to the first token behind a shared prefix of 512 tokens, warm against cold."""
    rng = random.Random(SEED)
    with Engine(reasoner, slots=4, capacity=704, prefix_gib=1) as engine:
        shared = tokens(rng, 512)

        def first(ask: tuple[int, ...]) -> None:
            engine.submit(replace(fixed(1, 1), prompt_ids=(*ask, *tokens(rng, PROMPT)))).result()

        first(shared)
        warm, cold = best(turns, lambda: first(shared), lambda: first(tokens(rng, 512)))
    detail = f"{warm:.3f} s warm, {cold:.3f} s cold"
    return Figure("time to first token, 512-token prefix warm / cold", name, warm / cold, "at most 0.3", detail)


def best(turns: int, *sides: Callable[[], object]) -> list[float]:
    """The best time of each side, in seconds, over turns that they take one after another."""
    times = [float("inf")] * len(sides)
    for _ in range(turns):
        for side, run in enumerate(sides):
            began = time.perf_counter()
            run()
            times[side] = min(times[side], time.perf_counter() - began)
    return times


# -- the table -------------------------------------------------------------------------------------------


def _line(figure: Figure) -> str:
    return f"| {figure.name} | {figure.model} | {figure.ratio:.2f} | {figure.bar} | {figure.detail} |"


def _shares(shares: dict[str, dict[str, float]]) -> list[str]:
    """Where the time under L goes, as a table."""
    return [
        f"| of the time under L | {' | '.join(shares)} |",
        "|---" * (1 + len(shares)) + "|",
        *(f"| {part} | {' | '.join(f'{own[part]:.0%}' for own in shares.values())} |" for part in PARTS),
    ]


def write(out: Path, figures: list[Figure], shares: dict[str, dict[str, float]], threads: dict[str, int]) -> None:
    """The tables as Markdown and JSON."""
    machine = f"{_processor()}, torch {torch.__version__}"
    on = ", ".join(f"{name} {count}" for name, count in threads.items())
    lines = [
        f"`{' '.join(['python -m benchmarks.engine', *sys.argv[1:]])}`, {machine}, threads: {on}",
        "",
        "| figure | model | ratio | bar | measured |",
        "|---|---|---|---|---|",
        *map(_line, figures),
        "",
        *_shares(shares),
        "",
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
