"""Soak test: thousands of mixed requests, a sample of them compared with the reference.

    python -m benchmarks.soak [--requests 20000] [--out benchmarks/results/soak]

24 concurrent clients send requests of every kind: single prompts and lists, every criterion, traces, streams, OpenAI's
endpoint, sampling, invalid requests, and disconnects from streams. A sample of the greedy answers is compared with what
the reference gives for each prompt alone. Answers with an iteration whose measure is within a relative 1e-3 of its
threshold are left out, because their exit may differ by one iteration. Memory and descriptors of the process are read
after a warm-up and at the end.
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
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from benchmarks.overload import resident_mib
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import generate
from slr_core.params import LoopParams
from slr_core.reasoner import LatentReasoner
from slr_core.tasks.prosqa import GraphSpec, generate_prosqa

CLIENTS, SAMPLE, NEAR = 24, 500, 1e-3
MEASURES = {"relative_change": "relative_change", "cosine": "cosine", "kl": "kl"}
CRITERIA = ({}, *({"criterion": name} for name in MEASURES), {"criterion": "fixed"}, {"threshold": 0.3, "patience": 2})


def random_request(random_: random.Random, prompts: list[str]) -> tuple[str, str, dict[str, Any]]:
    """A request: its kind, path and body."""
    body: dict[str, Any] = {"prompt": random_.choice(prompts), "max_new_tokens": 8, "max_iterations": 8}
    body["convergence"] = random_.choice(CRITERIA)
    kind = random_.choices(
        ("plain", "traced", "list", "streamed", "sampled", "completion", "invalid", "disconnect"),
        (40, 10, 10, 15, 5, 8, 5, 7),
    )[0]
    match kind:
        case "list":
            body["prompt"] = random_.sample(prompts, 3)
        case "sampled":
            body |= {"temperature": 1.2, "n": 2, "seed": random_.randrange(1000)}
        case "completion":
            return kind, "/v1/completions", {"prompt": body["prompt"], "max_tokens": 4, "echo": True, "logprobs": 1}
        case "invalid":
            body |= random_.choice([{"max_iterations": -1}, {"prompt": ""}, {"speed": 1}, {"n": 1000}])
        case "streamed" | "disconnect":
            body["stream"] = True
    return kind, "/trace" if kind == "traced" else "/generate", body


class Soak:
    """The clients and their results."""

    def __init__(self, url: str, total: int, prompts: list[str]) -> None:
        self.url, self.left, self.prompts = url, total, prompts
        self.random = random.Random(0)
        self.kinds: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.answers: list[tuple[dict[str, Any], dict[str, Any]]] = []

    async def run(self) -> None:
        """Run all clients."""
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=64)) as http:
            await asyncio.gather(*(self._client(http) for _ in range(CLIENTS)))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while self.left > 0:
            self.left -= 1
            kind, path, body = random_request(self.random, self.prompts)
            self.kinds[kind] += 1
            if body.get("stream"):
                await self._stream(http, kind, path, body)
                continue
            response = await http.post(path, json=body)
            self.statuses[f"{kind} {response.status_code}"] += 1
            if kind in ("plain", "traced"):
                self.answers.append((body, response.json()["results"][0]))

    async def _stream(self, http: httpx.AsyncClient, kind: str, path: str, body: dict[str, Any]) -> None:
        stop, name = self.random.randrange(1, 5), ""
        async with http.stream("POST", path, json=body) as response:
            async for line in response.aiter_lines():
                name = line.removeprefix("event: ") if line.startswith("event: ") else name
                if name == "result" and line.startswith("data: "):
                    self.answers.append((body, json.loads(line.removeprefix("data: "))))
                stop -= bool(line.startswith("data: ") and kind == "disconnect")
                if stop == 0:
                    break
        self.statuses[
            f"{kind} {response.status_code}" + ("" if name == "done" or kind == "disconnect" else " cut")
        ] += 1


def compare(answers: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, int]:
    """Compare a sample of answers with the reference."""
    reasoner = LatentReasoner.from_pretrained()
    sample = random.Random(1).sample(answers, min(SAMPLE, len(answers)))
    near = mismatches = 0
    for body, answer in sample:
        request = prepare(
            reasoner, body["prompt"], LoopParams(max_iterations=8, **body["convergence"]), max_new_tokens=8
        )
        (alone,) = generate(reasoner, [request])
        loop = request.loop
        measured = [getattr(record, MEASURES.get(loop.criterion, "norm")) for record in alone.records]
        if any(x is not None and abs(x - loop.threshold) <= NEAR * loop.threshold for x in measured):
            near += 1
            continue
        same = (answer["text"], answer["iterations"], answer["exit_reason"]) == (
            alone.text,
            alone.iterations,
            alone.exit_reason,
        )
        mismatches += not same
    return {"compared": len(sample) - near, "near_threshold": near, "mismatches": mismatches}


def resources(pid: int) -> tuple[float, int]:
    """Memory in MiB and open descriptors of a process, after it has noticed disconnects."""
    time.sleep(2)
    return resident_mib(pid), len(os.listdir(f"/proc/{pid}/fd"))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json")
    options = parser.parse_args()
    prompts = [
        example.question
        for example in islice(generate_prosqa(GraphSpec(nodes=10, min_hops=2, max_hops=4, balanced=False), 3), 200)
    ]
    command = [sys.executable, "-m", "slr_server.cli", "--port", "0", "--threads", "1", "--log-level", "warning"]
    process = subprocess.Popen([*command, "--elastic-floor", "1"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().split()[-1]
        asyncio.run(Soak(url, options.requests // 10, prompts).run())
        warm = resources(process.pid)
        soak = Soak(url, options.requests, prompts)
        asyncio.run(soak.run())
        after = resources(process.pid)
        metrics = httpx.get(f"{url}/metrics").text.splitlines()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        process.stdout.close()
    gauges = {
        name: float(line.split()[1])
        for line in metrics
        for name in ("slr_slots_in_use", "slr_requests_queued")
        if line.startswith(f"{name} ")
    }
    result = {
        "requests": options.requests,
        "kinds": dict(sorted(soak.kinds.items())),
        "statuses": dict(sorted(soak.statuses.items())),
        **compare(soak.answers),
        "memory_mib": {"warm": round(warm[0], 1), "after": round(after[0], 1)},
        "descriptors": {"warm": warm[1], "after": after[1]},
        "left": gauges,
        "exit_code": code,
    }
    lines = ["# Soak", "", "`python -m benchmarks.soak`, bundled checkpoint, 24 clients.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {json.dumps(value)} |" for name, value in result.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
