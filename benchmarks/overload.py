"""Overload: requests that arrive at 2, 4, 7 and 10 times the saturating rate, each on a new connection.

    python -m benchmarks.overload [--seconds 60] [--out benchmarks/results/overload]

The server runs in its own process with one engine thread. The model is untrained, with 10 million parameters and the
bundled checkpoint's tokenizer; with the criterion ``fixed``, every loop runs all of its 32 iterations, and answers have
at most 4 tokens. (With the bundled checkpoint, an iteration costs less than HTTP does, and the benchmark would measure
the machine's sockets.) First, a closed load with as many clients as slots and queue hold measures the saturating rate
and its latencies. Then requests arrive at random, independent of earlier answers, while a probe asks for liveness; with
elastic depth off at every rate, and with it on at 4 times the rate. After each load, the server's counters must equal
what the clients saw, and its memory must return.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.server_process import start_server
from slr_core.config import SLRConfig
from slr_core.reasoner import LatentReasoner

SLOTS, QUEUE, ITERATIONS, TOKENS = 8, 4, 32, 4
RATES = (2.0, 4.0, 7.0, 10.0)
"""Arrivals, as multiples of the saturating rate."""
ELASTIC_RATE = 4.0
SETTLE_S = 5.0
"""Seconds without load before memory is read."""
PROBE_EVERY_S = 0.1
LOST_S = 30.0
"""A request without a response for so long counts as failed."""
BODY = json.dumps(
    {
        "prompt": "Every rorpus is a lempus. Tom is a rorpus. Every wumpus is a impus. Fae is a wumpus. "
        "Is Fae a impus or yumpus?",
        "max_iterations": ITERATIONS,
        "convergence": {"criterion": "fixed"},
        "max_new_tokens": TOKENS,
    }
).encode()
HEAD = (
    "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
)


@dataclass
class Tally:
    """Outcomes of the requests of a phase; times in seconds."""

    seconds: float = 0.0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    failed: int = 0
    reduced: int = 0

    def row(self) -> dict[str, Any]:
        """Rates in 1/s, ``Retry-After`` in s, and times in ms."""
        return {
            "answered_per_s": round(len(self.answered) / self.seconds, 1),
            "refused_per_s": round(len(self.refused) / self.seconds, 1),
            "failed": self.failed,
            "p50_ms": _ms(self.answered, 0.5),
            "p99_ms": _ms(self.answered, 0.99),
            "refusal_p99_ms": _ms(self.refused, 0.99),
            "retry_after_s": quantile([float(s) for s in self.retry_after], 0.5),
            "liveness_max_ms": _ms(self.probes, 1.0),
            "reduced_share": round(self.reduced / max(1, len(self.answered)), 3),
        }


def quantile(values: list[float], share: float) -> float | None:
    """The quantile of the values at ``share``; ``None``: there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def _ms(seconds: list[float], share: float) -> float | None:
    value = quantile(seconds, share)
    return None if value is None else round(1000 * value, 1)


async def exchange(url: str, request: bytes) -> tuple[str, bytes]:
    """Send a request on a new connection; its response's head, in lower case, and body."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        return head, await reader.readexactly(int(header(head, "content-length")))
    finally:
        writer.close()


def header(head: str, name: str) -> str:
    """A header of a response."""
    return head.split(f"{name}:")[1].split("\r\n")[0].strip()


async def ask(url: str, tally: Tally) -> None:
    """Send a request and record its outcome."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(LOST_S):
            head, body = await exchange(url, HEAD.encode() + BODY)
    except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
        tally.failed += 1
        return
    took, status = time.perf_counter() - began, int(head.split()[1])
    if status == 200:
        tally.answered.append(took)
        tally.reduced += b'"budget_reduced":true' in body
    elif status in (429, 503):
        tally.refused.append(took)
        tally.retry_after.append(int(header(head, "retry-after")))
    else:
        tally.failed += 1


async def probe(url: str, tally: Tally) -> None:
    """Ask for liveness until cancelled. A probe that fails counts as long as a lost request."""
    while True:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(LOST_S):
                head, _ = await exchange(url, b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            alive = head.startswith("http/1.1 200")
        except (OSError, asyncio.IncompleteReadError):
            alive = False
        tally.probes.append(time.perf_counter() - began if alive else LOST_S)
        await asyncio.sleep(PROBE_EVERY_S)


async def closed_load(url: str, clients: int, seconds: float) -> Tally:
    """A number of clients, each of which sends its next request after the answer to the last."""
    tally, ends = Tally(seconds), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends:
            await ask(url, tally)

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def open_load(url: str, rate: float, seconds: float) -> Tally:
    """Requests that arrive at random, ``rate`` per second, each on a new connection."""
    tally, random_ = Tally(seconds), random.Random(0)
    probing = asyncio.create_task(probe(url, tally))
    began, at = time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        while (at := at + random_.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            group.create_task(ask(url, tally))
    probing.cancel()
    return tally


def counters(url: str) -> dict[str, float]:
    """The server's counts of requests to /generate, by status."""
    with urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    found = re.findall(r'^slr_requests_total{endpoint="/generate",status="(\w+)"} (\S+)$', text, re.MULTILINE)
    return {status: float(count) for status, count in found}


def miscounted(before: dict[str, float], after: dict[str, float], tally: Tally) -> int:
    """How far the server's counters are from what the clients saw."""
    seen = {"ok": len(tally.answered), "rejected": len(tally.refused)}
    return round(sum(abs(after[status] - before[status] - seen.get(status, 0)) for status in after))


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


def resident_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(model: Path, floor: float, seconds: float, rates: Sequence[float], rate: float | None) -> dict[str, Any]:
    """Measure one server, from start to shutdown.

    Args:
        model: its checkpoint.
        floor: its ``--elastic-floor``.
        seconds: duration of each load.
        rates: multiples of the saturating rate.
        rate: the saturating rate; ``None``: measured here.
    """
    process, url = start_server(model=model, slots=SLOTS, max_queue=QUEUE, elastic_floor=floor)
    loads: dict[str, Any] = {}
    try:
        asyncio.run(closed_load(url, SLOTS, min(5.0, seconds)))
        saturated = asyncio.run(closed_load(url, SLOTS + QUEUE, seconds / 3))
        if rate is None:
            rate = len(saturated.answered) / saturated.seconds
        asyncio.run(open_load(url, max(rates) * rate, min(5.0, seconds)))
        time.sleep(SETTLE_S)
        warm = resident_mib(process.pid)
        for multiple in rates:
            before = counters(url)
            tally = asyncio.run(open_load(url, multiple * rate, seconds))
            time.sleep(min(SETTLE_S, seconds))
            row = {**tally.row(), "miscounted": miscounted(before, counters(url), tally)}
            loads[f"{multiple:g}x"] = row | {"mib": round(resident_mib(process.pid), 1)}
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    return {
        "rate": rate,
        "saturated": saturated.row(),
        "loads": loads,
        "warm_mib": round(warm, 1),
        "exit_code": code,
    }


def report(off: dict[str, Any], on: dict[str, Any], seconds: float) -> str:
    """The figures as Markdown, with their targets."""
    names = ", ".join(off["loads"])
    lines = [
        f"# Overload: {names} the saturating rate for {seconds:g} s each",
        "",
        f"An untrained model of 10 million parameters, one engine thread, {SLOTS} slots, {QUEUE} places in the queue,",
        f"loops of {ITERATIONS} iterations (criterion `fixed`), {TOKENS} tokens; each request on a new connection;",
        "load from another process of the same machine, `python -m benchmarks.overload`.",
        f"Saturating rate (closed load, {SLOTS + QUEUE} clients): {off['rate']:.1f} answers a second.",
        f"Memory before the loads: {off['warm_mib']} MiB (elastic depth off), {on['warm_mib']} MiB (on).",
        "",
        "| elastic depth | load | answered /s | refused /s | failed | p50 ms | p99 ms | refusal p99 ms | Retry-After s "
        "| slowest liveness ms | reduced | miscounted | MiB after |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in (("off", off), ("on, floor 0.5", on)):
        for load, row in {"saturated": figures["saturated"], **figures["loads"]}.items():
            cells = " | ".join("" if v is None else str(v) for v in row.values())
            lines.append(f"| {name} | {load} | {cells} |{'  | |' if load == 'saturated' else ''}")
    rows = [(figures, row) for figures in (off, on) for row in figures["loads"].values()]
    growth = max(row["mib"] / figures["warm_mib"] - 1 for figures, row in rows)
    gain = on["loads"][f"{ELASTIC_RATE:g}x"]["answered_per_s"] / off["loads"][f"{ELASTIC_RATE:g}x"]["answered_per_s"]
    slower = max(row["p99_ms"] / figures["saturated"]["p99_ms"] for figures, row in rows)
    refusal = max(row["refusal_p99_ms"] for _, row in rows)
    liveness = max(row["liveness_max_ms"] for _, row in rows)
    lost = sum(row["failed"] + row["miscounted"] for _, row in rows) + (off["exit_code"] != 0) + (on["exit_code"] != 0)
    lines += [
        "",
        "| target | measured | |",
        "|---|---|---|",
        f"| no crash, no failed request, counters equal to what clients saw | {lost} | {_verdict(lost == 0)} |",
        f"| memory within 10 % of its warm value | {100 * growth:.1f} % | {_verdict(growth <= 0.1)} |",
        f"| p99 of accepted requests at most 2x that at saturation | {slower:.2f}x | {_verdict(slower <= 2)} |",
        f"| p99 of refusals under 0.5 s | {refusal:.1f} ms | {_verdict(refusal < 500)} |",
        f"| liveness under 1 s throughout | {liveness:.1f} ms | {_verdict(liveness < 1000)} |",
        f"| elastic depth: at least 1.3x the answers | {gain:.2f}x | {_verdict(gain >= 1.3)} |",
    ]
    return "\n".join(lines) + "\n"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="seconds of each load (60 for the committed figures)"
    )
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        off = measure(Path(folder), 1.0, options.seconds, RATES, None)
        on = measure(Path(folder), 0.5, options.seconds, (ELASTIC_RATE,), off["rate"])
    text = report(off, on, options.seconds)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps({"off": off, "on": on}, indent=1) + "\n")


if __name__ == "__main__":
    main()
