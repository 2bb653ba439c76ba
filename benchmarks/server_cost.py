"""What the server of this revision costs compared with an earlier one: a lone request's latency, and throughput.

    python -m benchmarks.server_cost [--before 3961545] [--rounds 40] [--out benchmarks/results/server_cost]

Default: the revision before limits on connections, requests, bodies, validation and answers were added to the server.
Both servers run at once, each in its own process with one engine thread, and take turns with short loads, so that a
change of the machine's speed meets both; the order changes with each round. Both serve the earlier revision's bundled
checkpoint, with which HTTP costs more than the model. Figures are medians over the rounds; a ratio is the median of the
rounds' ratios. Processor time is that of the server's process, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.overload import header

BEFORE = "3961545"
CLIENTS, LONE_REQUESTS, REQUESTS_PER_CLIENT = 32, 40, 10
WARMUP_ROUNDS = 2
LIMIT = 1.03
"""Most that the latency, or the time of a request under load, may grow by."""
ROOT = Path(__file__).parents[1]
BODY = json.dumps(
    {
        "prompt": "Every rorpus is a lempus. Tom is a rorpus. Is Tom a lempus or yumpus?",
        "max_iterations": 4,
        "convergence": {"criterion": "fixed"},
        "max_new_tokens": 4,
    }
).encode()


@dataclass
class Server:
    """A server of one revision, and what each round measured."""

    process: subprocess.Popen[str]
    url: str
    lone_ms: list[float] = field(default_factory=list)
    """Median latency of a request without others."""
    per_second: list[float] = field(default_factory=list)
    """Answers a second at 32 clients."""
    processor_ms: list[float] = field(default_factory=list)
    """Processor time of a request at 32 clients."""

    def processor_s(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def measure(self) -> None:
        """Run one round."""
        self.lone_ms.append(1000 * statistics.median(asyncio.run(send(self.url, LONE_REQUESTS))))
        began, used = time.perf_counter(), self.processor_s()
        asyncio.run(send_together(self.url))
        total = CLIENTS * REQUESTS_PER_CLIENT
        self.per_second.append(total / (time.perf_counter() - began))
        self.processor_ms.append(1000 * (self.processor_s() - used) / total)


async def send(url: str, count: int, body: bytes = BODY) -> list[float]:
    """Send requests one after the other on one connection; their latencies in seconds.

    Args:
        url: of the server.
        count: number of requests.
        body: of each.

    Raises:
        RuntimeError: an answer is not 200.
    """
    parts = urlsplit(url)
    head = f"POST {parts.path}/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    latencies = []
    try:
        for _ in range(count):
            began = time.perf_counter()
            writer.write(request)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(header(answer, "content-length")))
            if not answer.startswith("http/1.1 200"):
                raise RuntimeError(f"the server answers {answer.splitlines()[0]}")
            latencies.append(time.perf_counter() - began)
    finally:
        writer.close()
    return latencies


async def send_together(url: str) -> None:
    """Send the requests of :data:`CLIENTS` clients."""
    await asyncio.gather(*(send(url, REQUESTS_PER_CLIENT) for _ in range(CLIENTS)))


@contextmanager
def serve(source: Path, model: Path) -> Iterator[Server]:
    """A server of the packages ``slr_core`` and ``slr_server`` in a folder."""
    flags = ("--model", str(model), "--port", "0", "--threads", "1", "--log-level", "warning")
    process = subprocess.Popen(
        [sys.executable, "-m", "slr_server.cli", *flags],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline().split()[-1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def check_out(revision: str, folder: Path) -> Path:
    """The packages of a revision in a folder."""
    archive = subprocess.run(
        ["git", "archive", revision, "slr_core", "server"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    (folder / "server").rename(folder / "slr_server")
    return folder


def compare(before: Server, after: Server, rounds: int) -> dict[str, Any]:
    """Measure both in turns."""
    for i in range(WARMUP_ROUNDS + rounds):
        if i == WARMUP_ROUNDS:
            for server in (before, after):
                for values in (server.lone_ms, server.per_second, server.processor_ms):
                    values.clear()
        for server in (before, after) if i % 2 else (after, before):
            server.measure()
    figures: dict[str, Any] = {}
    for name in ("lone_ms", "per_second", "processor_ms"):
        old, new = getattr(before, name), getattr(after, name)
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures[name] = {
            "before": round(statistics.median(old), 3),
            "after": round(statistics.median(new), 3),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return figures


def report(revision: str, rounds: int, figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"# Cost of the server compared with revision {revision}",
        "",
        f"`python -m benchmarks.server_cost --before {revision} --rounds {rounds}`: both servers in turns, bundled",
        f"checkpoint, one engine thread each; {LONE_REQUESTS} requests alone and {CLIENTS * REQUESTS_PER_CLIENT} of",
        f"{CLIENTS} clients in each round.",
        "",
        "| | before | after | ratio | quartiles of the ratio | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title, worst in (
        ("lone_ms", "latency of a lone request, ms", LIMIT),
        ("per_second", f"answers a second, {CLIENTS} clients", 1 / LIMIT),
        ("processor_ms", "processor time of a request, ms", None),
    ):
        row = figures[name]
        cells = [title, row["before"], row["after"], row["ratio"], " to ".join(map(str, row["quartiles"]))]
        if worst is not None:
            met = row["ratio"] <= worst if worst > 1 else row["ratio"] >= worst
            cells += [f"{'at most' if worst > 1 else 'at least'} {worst:.2f}", "met" if met else "**missed**"]
        lines.append(f"| {' | '.join(map(str, cells))} |{'  | |' if worst is None else ''}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--before", default=BEFORE, help="git revision to compare with")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = check_out(options.before, Path(folder)), Path(folder) / "new"
        new.mkdir()
        (new / "slr_core").symlink_to(ROOT / "slr_core")
        (new / "slr_server").symlink_to(ROOT / "server")
        model = old / "slr_core/checkpoint/bundled/prosqa"
        with serve(old, model) as before, serve(new, model) as after:
            figures = compare(before, after, options.rounds)
    text = report(options.before, options.rounds, figures)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
