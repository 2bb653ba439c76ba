"""Overload: memory, latency of accepted requests and time of refusals under four times the saturating load.

    python -m benchmarks.overload [--seconds 60] [--out benchmarks/results/overload]

The server runs in its own process with one engine thread. The model is untrained, with 10 million parameters and the
bundled checkpoint's tokenizer; with the criterion ``fixed``, every loop runs all of its 32 iterations, and answers have
at most 4 tokens. (With the bundled checkpoint, an iteration costs less than HTTP does, and the benchmark would measure
the machine's sockets.) First, a closed load with as many clients as slots and queue hold measures the saturating rate
and its latencies. Then requests arrive at random at 4 times that rate, independent of earlier answers; with elastic
depth off, and again with it on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slr_core.config import SLRConfig
from slr_core.model.reasoner import LatentReasoner

SLOTS, QUEUE, ITERATIONS, TOKENS = 8, 4, 32, 4
OVERLOAD = 4.0
BODY = json.dumps(
    {
        "prompt": "Every rorpus is a lempus. Tom is a rorpus. Every wumpus is a impus. Fae is a wumpus. "
        "Is Fae a impus or yumpus?",
        "max_iterations": ITERATIONS,
        "convergence": {"criterion": "fixed"},
        "max_new_tokens": TOKENS,
    }
).encode()
HEAD = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"


@dataclass
class Tally:
    """Outcomes of the requests of a phase; times in seconds."""

    seconds: float = 0.0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: int = 0
    reduced: int = 0

    def row(self) -> dict[str, Any]:
        """Rates in 1/s and times in ms."""
        return {
            "answered_per_s": round(len(self.answered) / self.seconds, 1),
            "refused_per_s": round(len(self.refused) / self.seconds, 1),
            "failed": self.failed,
            "p50_ms": round(1000 * quantile(self.answered, 0.5), 1),
            "p99_ms": round(1000 * quantile(self.answered, 0.99), 1),
            "refusal_p50_ms": round(1000 * median(self.refused), 1) if self.refused else None,
            "reduced_share": round(self.reduced / max(1, len(self.answered)), 3),
        }


def quantile(values: list[float], share: float) -> float:
    """The quantile of the values at ``share``."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


class Connections:
    """Keep-alive connections to one server, with as little work per request as possible."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def request(self, tally: Tally) -> None:
        """Send a request and record its outcome."""
        began = time.perf_counter()
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
            writer.write(HEAD.encode() + BODY)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            tally.failed += 1
            return
        self.idle.append((reader, writer))
        took, status = time.perf_counter() - began, int(head.split()[1])
        if status == 200:
            tally.answered.append(took)
            tally.reduced += b'"budget_reduced":true' in body
        elif status == 429:
            tally.refused.append(took)
        else:
            tally.failed += 1

    def close(self) -> None:
        """Close them."""
        for _, writer in self.idle:
            writer.close()


async def closed_load(url: str, clients: int, seconds: float) -> Tally:
    """A number of clients, each of which sends its next request after the answer to the last."""
    tally, connections, ends = Tally(seconds), Connections(url), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends:
            await connections.request(tally)

    await asyncio.gather(*(client() for _ in range(clients)))
    connections.close()
    return tally


async def open_load(url: str, rate: float, seconds: float) -> Tally:
    """Requests that arrive at random, ``rate`` per second."""
    tally, connections, random_ = Tally(seconds), Connections(url), random.Random(0)
    began, at, tasks = time.perf_counter(), 0.0, set()
    while (at := at + random_.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        task = asyncio.create_task(connections.request(tally))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    connections.close()
    return tally


def build(folder: Path) -> None:
    """Save a model with random weights."""
    torch.manual_seed(0)
    bundled = LatentReasoner.from_pretrained()
    shape = LlamaConfig(
        vocab_size=len(bundled.tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=256,
    )
    loop = {"loop": {"trained_iterations": 8, "max_iterations": ITERATIONS, "lora": {"rank": 8, "alpha": 16}}}
    made = LatentReasoner(LlamaForCausalLM(shape), bundled.tokenizer, SLRConfig.from_dict(loop))
    made.eval().save_pretrained(str(folder))


def serve(model: Path, floor: float) -> tuple[subprocess.Popen[str], str]:
    """Start a server; returns its process and URL."""
    flags = {
        "model": model,
        "port": "0",
        "threads": "1",
        "slots": SLOTS,
        "max-queue": QUEUE,
        "elastic-floor": floor,
        "log-level": "warning",
    }
    command = [sys.executable, "-m", "slr_server.cli", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(model: Path, floor: float, seconds: float, rate: float | None) -> dict[str, Any]:
    """Measure one server, from start to shutdown."""
    process, url = serve(model, floor)
    try:
        asyncio.run(closed_load(url, SLOTS, min(5.0, seconds)))
        saturated = asyncio.run(closed_load(url, SLOTS + QUEUE, seconds / 3))
        if rate is None:
            rate = len(saturated.answered) / saturated.seconds
        asyncio.run(open_load(url, OVERLOAD * rate, min(5.0, seconds)))
        warm = resident_mib(process.pid)
        over = asyncio.run(open_load(url, OVERLOAD * rate, seconds))
        after = resident_mib(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    return {
        "rate": rate,
        "saturated": saturated.row(),
        "overloaded": over.row(),
        "warm_mib": round(warm, 1),
        "after_mib": round(after, 1),
        "exit_code": code,
    }


def report(off: dict[str, Any], on: dict[str, Any], seconds: float) -> str:
    """The figures as Markdown, with their targets."""
    lines = [
        f"# Overload: {OVERLOAD:g}x the saturating rate for {seconds:g} s",
        "",
        f"An untrained model of 10 million parameters, one engine thread, {SLOTS} slots, {QUEUE} places in the queue,",
        f"loops of {ITERATIONS} iterations (criterion `fixed`), {TOKENS} tokens; load from another process of the same",
        "machine, `python -m benchmarks.overload`.",
        f"Saturating rate (closed load, {SLOTS + QUEUE} clients): {off['rate']:.1f} answers a second.",
        "",
        "| elastic depth | load | answered /s | refused /s | failed | p50 ms | p99 ms | refusal p50 ms | reduced |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in (("off", off), ("on, floor 0.5", on)):
        for load in ("saturated", "overloaded"):
            cells = " | ".join("" if v is None else str(v) for v in figures[load].values())
            lines.append(f"| {name} | {load} | {cells} |")
    over, calm = off["overloaded"], off["saturated"]
    growth = max(abs(f["after_mib"] / f["warm_mib"] - 1) for f in (off, on))
    gain = on["overloaded"]["answered_per_s"] / over["answered_per_s"]
    refusal = max(f["overloaded"]["refusal_p50_ms"] for f in (off, on))
    crashes = sum(f["exit_code"] != 0 or f["overloaded"]["failed"] > 0 for f in (off, on))
    lines += [
        "",
        "| target | measured | |",
        "|---|---|---|",
        f"| no crash, no failed request | {crashes} | {_verdict(crashes == 0)} |",
        f"| memory within 10 % of its warm value | {100 * growth:.1f} % | {_verdict(growth <= 0.1)} |",
        f"| p99 of accepted requests at most 2x that at saturation | {over['p99_ms'] / calm['p99_ms']:.2f}x "
        f"| {_verdict(over['p99_ms'] <= 2 * calm['p99_ms'])} |",
        f"| refusals under 50 ms at the median | {refusal:.1f} ms | {_verdict(refusal < 50)} |",
        f"| elastic depth: at least 1.3x the answers | {gain:.2f}x | {_verdict(gain >= 1.3)} |",
    ]
    return "\n".join(lines) + "\n"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="seconds of overload (60 for the committed figures)"
    )
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        off = measure(Path(folder), 1.0, options.seconds, None)
        on = measure(Path(folder), 0.5, options.seconds, off["rate"])
    text = report(off, on, options.seconds)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps({"off": off, "on": on}, indent=1) + "\n")


if __name__ == "__main__":
    main()
