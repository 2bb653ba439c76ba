"""Ray Serve: the throughput of two replicas over one, and what Serve adds to the latency of a request.

    python -m benchmarks.ray_serve [--seconds 10] [--rounds 3] [--out benchmarks/results/ray_serve]

Needs the extra `ray` and two cores. One application with one replica, one with two, and `slr-serve` without Ray run at
once on this machine, each engine with one thread. They get their loads in turns, so that a change of the machine's
speed meets all; a server without a load uses next to no processor time. The load generator, Ray's proxy and Ray's own
processes run on the same two cores. The model is that of `benchmarks.overload`.

A long request has 4 answers of 32 iterations: the replica computes for about 180 ms, client and proxy for a few, so the
replicas are the bottleneck. A short one has one answer of one iteration and one token: then client, proxy and replica
need about as much, and a second replica finds no free core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.overload import BODY, build
from benchmarks.server_cost import send
from benchmarks.server_process import start_server

SLOTS, CLIENTS = 8, 12
"""Slots of each replica, and clients of a load. A long request takes 4 slots, so 12 of them keep two replicas full."""
RAMP_S = 1.0
"""Seconds of each load before answers count."""
PORT = 8765
"""Of Ray's proxy."""
PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "slr_server.ray_proxy:proxy_middlewares"}
LONE_REQUESTS = {"short": 40, "long": 4}
"""Requests one after the other, in each round."""
TARGET = 1.7
"""Throughput of two replicas over one, for long requests."""
FIXED = json.loads(BODY)
CONDITIONS = (
    "Two cores, one thread for each engine; load generator, Ray's proxy and Ray's own processes run on the same cores.",
    "An untrained model of 10 million parameters. A long request has 4 answers of 32 iterations: replicas are the",
    "bottleneck. A short one has one answer of one iteration and one token: client, proxy and replica compete for the",
    "cores. Medians of the rounds; in each, all servers in turns.",
)
BODIES = {
    name: json.dumps({**FIXED, **changes}).encode()
    for name, changes in (
        ("short", {"max_iterations": 1, "max_new_tokens": 1}),
        ("long", {"n": 4, "temperature": 1.0, "seed": 0}),
    )
}


@dataclass
class Target:
    """A server, and its figures of each round by kind of request."""

    url: str
    lone_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BODIES})
    """Latencies of requests without others, of all rounds."""
    per_second: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BODIES})
    """Requests answered per second by :data:`CLIENTS` clients."""

    def measure_alone(self, kind: str) -> None:
        """Send requests one after the other."""
        sent = asyncio.run(send(self.url, LONE_REQUESTS[kind], BODIES[kind]))
        self.lone_ms[kind] += [1000 * seconds for seconds in sent]

    def measure_load(self, kind: str, seconds: float) -> None:
        """Send requests by clients that ask again after each answer; count the answers after the first second."""
        began, ended = time.perf_counter(), 0

        async def client() -> None:
            nonlocal ended
            while time.perf_counter() < began + RAMP_S + seconds:
                await send(self.url, 1, BODIES[kind])
                now = time.perf_counter()
                ended += began + RAMP_S <= now < began + RAMP_S + seconds

        async def run() -> None:
            await asyncio.gather(*(client() for _ in range(CLIENTS)))

        asyncio.run(run())
        self.per_second[kind].append(ended / seconds)


@contextmanager
def serve_with_ray(model: str) -> Iterator[str]:
    """Applications ``/one`` and ``/two``, named by their replicas, on a Ray cluster of this machine: its URL."""
    # Ray's workers are nice by default: beside anything else, they would measure that.
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", **PROXY)
    import ray
    from ray import serve

    from slr_server.ray_serve import LatentServer

    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        settings = {"model": model, "slots": SLOTS, "log_level": "warning", "elastic_floor": 1}
        for name, replicas in (("one", 1), ("two", 2)):
            deployment = LatentServer.options(num_replicas=replicas, max_ongoing_requests=48)
            serve.run(deployment.bind(settings), name=name, route_prefix=f"/{name}")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


@contextmanager
def serve_alone(model: str) -> Iterator[str]:
    """``slr-serve`` with the same settings: its URL."""
    process, url = start_server(model=model, slots=SLOTS, elastic_floor=1)
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def measure(targets: dict[str, Target], rounds: int, seconds: float) -> None:
    """Measure all in turns; the first round is a warm-up."""
    for i in range(1 + rounds):
        if i == 1:
            for name, target in targets.items():
                targets[name] = Target(target.url)
        for kind in BODIES:
            order = list(targets.values())
            for target in order if i % 2 else reversed(order):
                target.measure_alone(kind)
            for target in order if i % 2 else reversed(order):
                target.measure_load(kind, seconds if i else min(5.0, seconds))


def figures(targets: dict[str, Target]) -> dict[str, Any]:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    alone, one, two = (targets[name] for name in ("slr-serve", "one", "two"))
    found: dict[str, Any] = {}
    for kind in BODIES:
        ratios = [b / a for a, b in zip(one.per_second[kind], two.per_second[kind], strict=True)]
        found[kind] = {
            "per_second": {name: statistics.median(target.per_second[kind]) for name, target in targets.items()},
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "p50_ms": {name: statistics.median(target.lone_ms[kind]) for name, target in targets.items()},
            "overhead_ms": statistics.median(one.lone_ms[kind]) - statistics.median(alone.lone_ms[kind]),
        }
    return found


def report(found: dict[str, Any], rounds: int, seconds: float) -> str:
    """The figures as Markdown."""
    lines = [
        "# Ray Serve: two replicas over one, and the cost of a request",
        "",
        f"`python -m benchmarks.ray_serve --rounds {rounds} --seconds {seconds:g}`: {CLIENTS} clients, {SLOTS} slots.",
        *CONDITIONS,
        "",
        "| requests | `slr-serve`, requests/s | one replica | two replicas | two over one | of each round |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in found.items():
        rates = row["per_second"]
        cells = [f"{rates[name]:.1f}" for name in ("slr-serve", "one", "two")]
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        lines.append(f"| {kind} | {' | '.join(cells)} | {row['ratio']:.2f}x | {ratios} |")
    lines += [
        "",
        "| lone request | `slr-serve`, p50 ms | through Ray Serve, p50 ms | overhead, ms |",
        "|---|---|---|---|",
    ]
    for kind, row in found.items():
        p50 = row["p50_ms"]
        lines.append(f"| {kind} | {p50['slr-serve']:.1f} | {p50['one']:.1f} | {row['overhead_ms']:+.1f} |")
    verdict = "met" if found["long"]["ratio"] >= TARGET else "**missed**"
    lines += ["", f"Target for long requests: at least {TARGET}x, {verdict} with {found['long']['ratio']:.2f}x."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        with serve_alone(folder) as alone, serve_with_ray(folder) as url:
            targets = {"slr-serve": Target(alone), "one": Target(f"{url}/one"), "two": Target(f"{url}/two")}
            measure(targets, options.rounds, options.seconds)
    found = figures(targets)
    text = report(found, options.rounds, options.seconds)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
