"""What the engine costs and what it gains, every figure a ratio of two times measured side by side.

    make bench                      (python -m benchmarks.engine --out benchmarks/results/engine)

Two models: the bundled checkpoint, whose passes are so short that overhead shows, and a Llama-shaped random one of
135M parameters (30 layers, width 576, vocabulary 49,152) with 8 loop adapters of rank 16 on all linear layers.
Load L: 32 requests at once, prompts of 16 tokens, exits spread evenly over 1 to 16 iterations, 1 to 32 new tokens.
The bound is the time of the bare base model's passes over the same shapes: no adapters, no engine.
Both sides of a ratio run on as many threads as the engine finds fastest. They take turns, and the best turn of each
counts: a busy machine slows single turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from slr_core import LatentReasoner
from slr_core.base import hidden_size
from slr_core.config import SLRConfig
from slr_core.engine import Engine
from slr_core.engine.bank import AdapterBank
from slr_core.engine.cache import shape
from slr_core.generation import Request, generate
from slr_core.loop.convergence import LoopSettings
from slr_core.sampling import SamplingSettings

SEED = 20261124
ROWS, PROMPT, ITERATIONS, TOKENS = 32, 16, 16, 32


class Endless(LatentReasoner):
    """A model whose answers are as long as asked."""

    end_tokens = frozenset()  # type: ignore[assignment]


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
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    figures: list[Figure] = []
    makers: dict[str, Callable[[], LatentReasoner]] = {
        "bundled": lambda: Endless.from_pretrained(None),
        "135M": lambda: llama(options.layers),
    }
    for name, make in makers.items():
        if options.only in (None, name):
            for figure in measure(name, make(), options.turns):
                figures.append(figure)
                print(_line(figure), flush=True)
    if options.out:
        write(options.out, figures)


def measure(name: str, reasoner: LatentReasoner, turns: int) -> Iterator[Figure]:
    """The figures of one model."""
    large = name != "bundled"
    with Engine(reasoner, slots=ROWS, capacity=704, prefix_gib=0) as engine:
        engine.submit(fixed(engine, 1, 1)).result()
        if engine.threads:
            torch.set_num_threads(engine.threads)  # what the engine found fastest, for everything beside it
        yield against_bound(name, engine, turns, bar="at least 0.85" if large else "at least 0.6")
        yield against_lockstep(name, engine, turns)
        yield alone(name, engine, turns)
        yield diagnostics(name, engine, turns)
        if large:
            yield one_at_a_time(name, engine, PROMPT, bar="at least 4")
            yield one_at_a_time(name, engine, 128, bar="reported")
    if large:
        yield from adapters(name, reasoner, turns)
        yield prefix(name, reasoner, turns)


# -- the figures -----------------------------------------------------------------------------------------


def against_bound(name: str, engine: Engine, turns: int, bar: str) -> Figure:
    """The engine under L against the bare passes that it made."""
    requests = load(engine, 3 * ROWS)
    with recorded(engine) as passes:
        closed_loop(engine, requests)
    ours, bound = sides(turns, lambda: closed_loop(engine, requests), lambda: bare(engine, passes))
    rows = sum(n for n, _, _ in passes.shapes) / engine_steps(passes)
    detail = f"{ours:.2f} s, bound {bound:.2f} s, {rows:.1f} rows a step"
    return Figure("bound / engine under L", name, bound / ours, bar, detail)


def against_lockstep(name: str, engine: Engine, turns: int) -> Figure:
    """Throughput under L against batches that wait for their slowest row."""
    requests = load(engine, 3 * ROWS)

    def lockstep() -> None:
        for start in range(0, len(requests), ROWS):
            generate(engine.reasoner, requests[start : start + ROWS])

    ours, theirs = sides(turns, lambda: closed_loop(engine, requests), lockstep)
    return Figure("throughput under L / lockstep batches", name, theirs / ours, "at least 1.4", f"{theirs:.2f} s")


def one_at_a_time(name: str, engine: Engine, prompt: int, bar: str) -> Figure:
    """Throughput under L against the reference, one request after the other."""
    requests = load(engine, 2 * ROWS, prompt)
    few = requests[:: len(requests) // 8][:8]

    def reference() -> None:
        for request in few:
            generate(engine.reasoner, [request])

    ours, theirs = sides(2, lambda: closed_loop(engine, requests), reference)
    ratio = (theirs / work(few)) / (ours / work(requests))
    return Figure(f"throughput under L / one at a time, {prompt}-token prompts", name, ratio, bar, "by passes of rows")


def alone(name: str, engine: Engine, turns: int) -> Figure:
    """A lone request's latency against the reference's."""
    request = fixed(engine, 8, 16)
    many = 10 if name == "bundled" else 1
    ours, theirs = sides(
        2 * turns,
        lambda: [engine.submit(request).result() for _ in range(many)],
        lambda: [generate(engine.reasoner, [request]) for _ in range(many)],
    )
    return Figure("a lone request's latency / the reference's", name, ours / theirs, "at most 1.05", f"{theirs:.3f} s")


def diagnostics(name: str, engine: Engine, turns: int) -> Figure:
    """Recording all that /trace shows for every row against nothing."""
    requests = load(engine, 2 * ROWS)
    traced = [replace(request, trace=True, top_tokens=5, include_states=True) for request in requests]
    ours, plain = sides(turns, lambda: closed_loop(engine, traced), lambda: closed_loop(engine, requests))
    return Figure("under L, every row traced / none", name, ours / plain, "at most 1.15", f"{plain:.2f} s untraced")


def adapters(name: str, reasoner: LatentReasoner, turns: int) -> Iterator[Figure]:
    """A decode or loop step of 32 rows with 8 different adapters, against none and against PEFT's own mixed batch."""
    base, width = reasoner.base, 40
    bank = AdapterBank(base)
    names = reasoner.config.loop.adapters
    bank.fill([(base, adapter) for adapter in names])
    bank.tune(ROWS, 1)
    x = torch.randn(ROWS, 1, hidden_size(base))
    plain: list[int | None] = [None] * ROWS
    mixed: list[int | None] = [row % len(names) for row in range(ROWS)]

    def step(rows: list[int | None]) -> Callable[[], None]:
        def run() -> None:
            bank.use(rows)
            bank.model.base_model(inputs_embeds=x, past_key_values=filled(base, ROWS, width), use_cache=True)

        return run

    def peft() -> None:
        with mixed_by_peft(base, [names[row % len(names)] for row in range(ROWS)]):
            base.base_model(inputs_embeds=x, past_key_values=filled(base, ROWS, width), use_cache=True)

    with torch.inference_mode():
        ours, none = sides(4 * turns, step(mixed), step(plain))
        again, theirs = sides(2 * turns, step(mixed), peft)
    methods = {layer.method for layer in bank.layers.values()}
    detail = f"{1000 * none:.0f} ms without, {', '.join(sorted(methods))}"
    yield Figure("step with 8 adapters / with none", name, ours / none, "at most 1.25", detail)
    yield Figure("PEFT's mixed batch / that step", name, theirs / again, "at least 3", f"{1000 * theirs:.0f} ms")


def prefix(name: str, reasoner: LatentReasoner, turns: int) -> Figure:
    """Time to the first token behind a shared prefix of 512 tokens, warm against cold."""
    rng = random.Random(SEED)
    with Engine(reasoner, slots=4, capacity=704, prefix_gib=1) as engine:
        shared = tuple(rng.randrange(10, 1000) for _ in range(512))

        def first(warm: bool) -> float:
            ask = shared if warm else tuple(rng.randrange(10, 1000) for _ in range(512))
            ids = (*ask, *(rng.randrange(10, 1000) for _ in range(PROMPT)))
            request = replace(fixed(engine, 1, 1), prompt_ids=ids)
            began = time.perf_counter()
            engine.submit(request).result()
            return time.perf_counter() - began

        first(warm=True)
        times = [(first(warm=True), first(warm=False)) for _ in range(turns)]
    warm, cold = (min(side) for side in zip(*times, strict=True))
    detail = f"{warm:.3f} s warm, {cold:.3f} s cold"
    return Figure("time to first token, 512-token prefix warm / cold", name, warm / cold, "at most 0.3", detail)


# -- how they are measured -------------------------------------------------------------------------------


def sides(turns: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """The best time of each, in seconds, after a turn that does not count."""
    best = [float("inf"), float("inf")]
    for turn in range(turns + 1):
        for side, run in enumerate((ours, theirs)):
            began = time.perf_counter()
            run()
            if turn:
                best[side] = min(best[side], time.perf_counter() - began)
    return best[0], best[1]


def load(engine: Engine, count: int, prompt: int = PROMPT) -> list[Request]:
    """Requests of load L."""
    rng = random.Random(SEED)
    exits = [1 + i % ITERATIONS for i in range(count)]
    rng.shuffle(exits)
    return [replace(fixed(engine, exit_at, rng.randint(1, TOKENS)), prompt_ids=_ids(rng, prompt)) for exit_at in exits]


def fixed(engine: Engine, iterations: int, tokens: int) -> Request:
    """A request of a given length."""
    return Request(
        prompt_ids=_ids(random.Random(iterations), PROMPT),
        answer_prefix_ids=(),
        loop=LoopSettings(iterations, iterations, "fixed", 0.0, 1),
        max_new_tokens=tokens,
        sampling=SamplingSettings(),
        stop=(),
        trace=False,
        top_tokens=0,
        include_states=False,
    )


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(4, 40) for _ in range(count))


def work(requests: list[Request]) -> int:
    """Passes of rows."""
    return sum(r.loop.max_iterations + r.max_new_tokens for r in requests)


def closed_loop(engine: Engine, requests: list[Request]) -> None:
    """Answer them, as many at once as there are slots."""
    for future in [engine.submit(request) for request in requests]:
        future.result()


@dataclass
class Passes:
    """Shapes of what an engine ran: rows, positions and columns of each pass, and rows read by the head."""

    shapes: list[tuple[int, int, int]]
    heads: list[int]


def engine_steps(passes: Passes) -> int:
    """Passes of single positions: one a step, once a run is under way."""
    return max(1, sum(1 for _, queries, _ in passes.shapes if queries == 1))


@contextmanager
def recorded(engine: Engine) -> Iterator[Passes]:
    """Note every pass inside the block."""
    passes = Passes([], [])

    def note(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        if "past_key_values" not in options:
            return  # the engine tries how many threads are fastest
        rows, queries, _ = options["inputs_embeds"].shape
        passes.shapes.append((rows, queries, options["attention_mask"].shape[-1]))

    def note_head(_module: Any, args: tuple[torch.Tensor]) -> None:
        passes.heads.append(len(args[0]))

    hooks = [
        engine.model.base_model.register_forward_pre_hook(note, with_kwargs=True),
        engine.model.get_output_embeddings().register_forward_pre_hook(note_head),  # type: ignore[no-untyped-call]
    ]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def bare(engine: Engine, passes: Passes) -> None:
    """The same passes by the base model alone."""
    model, width = engine.model, hidden_size(engine.model)
    engine._bank.rows = None  # the engine is idle: its model runs without adapters
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for rows, queries, columns in passes.shapes:
        x = torch.zeros(rows, queries, width)
        model.base_model(inputs_embeds=x, past_key_values=filled(model, rows, columns - queries), use_cache=True)
    for rows in passes.heads:
        head(torch.zeros(rows, width))


def filled(model: Any, rows: int, columns: int) -> DynamicCache:
    """A cache of some columns, made without a pass."""
    cache = DynamicCache()
    layers, heads, head_dim = shape(model)
    if columns:
        blank = torch.zeros(1, 1, 1, 1).expand(rows, heads, columns, head_dim)
        for layer in range(layers):
            cache.update(blank, blank, layer)
    return cache


@contextmanager
def mixed_by_peft(base: Any, names: list[str]) -> Iterator[None]:
    """PEFT's mixed batch: what ``adapter_names`` does in a PeftModel, for adapters that were injected."""
    from functools import partial

    from peft.tuners.lora import LoraLayer

    def hand_over(_module: Any, args: Any, options: dict[str, Any], adapter_names: list[str]) -> Any:
        options["adapter_names"] = adapter_names
        return args, options

    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [names[0]]
    hooks = [
        layer.register_forward_pre_hook(partial(hand_over, adapter_names=names), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for hook, layer, before in zip(hooks, layers, active, strict=True):
            hook.remove()
            layer._active_adapter = before


def llama(layers: int) -> LatentReasoner:
    """The Llama-shaped random model."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    config = SLRConfig.from_dict(
        {"loop": {"trained_iterations": 8, "max_iterations": 16, "lora": {"rank": 16}, "timestep": {"kind": "learned"}}}
    )
    reasoner = Endless(base.eval(), LatentReasoner.from_pretrained(None).tokenizer, config).eval()
    with torch.no_grad():
        for key, weight in reasoner.base.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.02)
    return reasoner


# -- the table -------------------------------------------------------------------------------------------


def _line(figure: Figure) -> str:
    return f"| {figure.name} | {figure.model} | {figure.ratio:.2f} | {figure.bar} | {figure.detail} |"


def write(out: Path, figures: list[Figure]) -> None:
    """The table as Markdown and JSON."""
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"`python -m benchmarks.engine`, {machine}",
        "",
        "| figure | model | ratio | bar | times |",
        "|---|---|---|---|---|",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join([*lines, *map(_line, figures), ""]), encoding="utf-8")
    record = {"machine": machine, "seed": SEED, "figures": [asdict(figure) for figure in figures]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
