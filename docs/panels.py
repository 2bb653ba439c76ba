"""The pictures of docs/operations.md: panels of the dashboards, drawn from what a Prometheus has recorded.

    python docs/panels.py                                          # five minutes; needs the Debian package prometheus
    python docs/panels.py --prometheus http://127.0.0.1:9090 --seconds 600      # only draws

Without --prometheus, starts a server and a Prometheus and sends the traffic that docs/operations.md describes.
Runs the queries of the committed dashboards, as Grafana does, and draws the results with matplotlib.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import matplotlib
import yaml

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, PercentFormatter

from slr_core.evaluation.load_generator import LoadPlan, run_load

HERE = Path(__file__).parent
DASHBOARDS = HERE.parent / "deploy/grafana/dashboards"
STEP_S, WINDOW = 5, "30s"
PICTURES = {
    "slr-overview": ("Requests by outcome", "Latency", "Exit reasons", "Iterations"),
    "slr-stability": (
        *("Iterations", "Iterations saved by early exit", "Relative change by iteration, median"),
        *("Contraction by iteration, median", "Share expanding by iteration", "State norm by iteration, mean"),
    ),
    "slr-latency": ("Mean time by stage", "Time to first token", "Answers per step", "Step duration"),
    "slr-capacity": ("Slots", "Queue", "Engine utilization", "Iterations and steps"),
}


def main() -> None:
    """Draw a picture of each dashboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", metavar="URL", help="draw what this Prometheus has recorded")
    parser.add_argument("--seconds", type=float, default=600, help="length of the period before now (default: 600)")
    options = parser.parse_args()
    if options.prometheus is not None:
        draw_dashboards(options.prometheus, time.time() - options.seconds, time.time())
        return
    with TemporaryDirectory() as folder, start_server() as server, start_prometheus(server, Path(folder)) as prometheus:
        time.sleep(10)  # rates need two scrapes
        start = time.time()
        asyncio.run(send_traffic(server))
        draw_dashboards(prometheus, start, time.time())


# -- the run -----------------------------------------------------------------------------------------------


@contextmanager
def start_server() -> Iterator[str]:
    """Run a server with 16 slots on one thread; yields its URL."""
    command = [sys.executable, "-m", "slr_server.cli", "--port=0", "--threads=1", "--slots=16", "--log-level=error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@contextmanager
def start_prometheus(server: str, folder: Path) -> Iterator[str]:
    """Run a Prometheus that scrapes ``server`` with the committed scrape interval; yields its URL."""
    config = yaml.safe_load((HERE.parent / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    config["scrape_configs"] = [{"job_name": "slr", "static_configs": [{"targets": [server.removeprefix("http://")]}]}]
    del config["rule_files"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    options = ("config.file=prometheus.yml", "storage.tsdb.path=data", f"web.listen-address={address}")
    command = ["prometheus", *(f"--{option}" for option in options), "--log.level=error"]
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


async def send_traffic(server: str) -> None:
    """The five phases of traffic that docs/operations.md describes."""
    await run_load(LoadPlan(server, duration_s=70, rate=8, hops=(2, 3, 4)))
    await run_load(LoadPlan(server, duration_s=50, concurrency=16, hops=(2, 3, 4)))
    await run_load(LoadPlan(server, duration_s=50, rate=15, hops=(4,)))
    await asyncio.gather(
        run_load(LoadPlan(server, duration_s=60, rate=16 / 3)), send_deep(server, duration_s=60, rate=8 / 3)
    )
    await run_load(LoadPlan(server, duration_s=40, rate=8, hops=(2,)))


async def send_deep(server: str, duration_s: float, rate: float) -> None:
    """Send ``rate`` requests per second whose loops are forced to 8, 12 or 16 iterations."""
    rng, source = random.Random(0), LoadPlan(server, hops=(2, 3, 4), seed=1).questions()
    end = time.monotonic() + duration_s
    async with httpx.AsyncClient(base_url=server, timeout=60) as client, asyncio.TaskGroup() as requests:
        while time.monotonic() < end:
            await asyncio.sleep(rng.expovariate(rate))
            depth = {"max_iterations": rng.choice((8, 12, 16)), "convergence": {"criterion": "fixed"}}
            requests.create_task(client.post("/generate", json={"prompt": next(source).question, **depth}))


# -- drawing -----------------------------------------------------------------------------------------------


def draw_dashboards(prometheus: str, start: float, end: float) -> None:
    """Write a picture of each dashboard's main panels, over the time from ``start`` to ``end`` (Unix seconds)."""
    plt.rcParams.update(
        {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "slr", "svg.fonttype": "none"}
    )
    with httpx.Client(base_url=prometheus, timeout=30) as client:
        for name, titles in PICTURES.items():
            dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
            panels = {panel["title"]: panel for panel in reversed(dashboard["panels"])}
            rows = (len(titles) + 1) // 2
            figure, axes = plt.subplots(rows, 2, figsize=(11, 2.7 * rows), layout="constrained")
            for axis, title in zip(axes.flat, titles, strict=True):
                draw(client, axis, panels[title], start, end)
            figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def draw(client: httpx.Client, axis: Axes, panel: dict[str, Any], start: float, end: float) -> None:
    """Draw one panel."""
    axis.set_title(panel["title"], loc="left", fontsize=9, fontweight="bold")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "heatmap":
        _heat(client, axis, panel, start, end)
        return
    curves = [
        (_legend(target["legendFormat"], series["metric"]), series["values"])
        for target in panel["targets"]
        for series in _range(client, target["expr"], start, end)
    ]
    curves.sort(key=lambda curve: re.sub(r"\d+", lambda number: number[0].zfill(4), curve[0]))
    stacked = panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal"
    values = [[float(value) for _, value in points] for _, points in curves]
    # Skip curves without numbers, and in a stack those that are 0 throughout.
    drawn = [
        curve
        for curve, ys in zip(curves, values, strict=True)
        if any(map(np.nan_to_num if stacked else np.isfinite, ys))
    ]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(2, len(drawn)))) if len(drawn) > 5 else None
    if stacked:
        times, heights = _table([points for _, points in drawn])
        axis.stackplot([_minutes(at, start) for at in times], heights, labels=[name for name, _ in drawn], alpha=0.7)
    else:
        for i, (name, points) in enumerate(drawn):
            color = None if colors is None else colors[i]
            xs, ys = [_minutes(at, start) for at, _ in points], [float(value) for _, value in points]
            axis.plot(xs, ys, linewidth=1.2, label=name, color=color)
    if panel["fieldConfig"]["defaults"]["custom"].get("scaleDistribution", {}).get("type") == "log":
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.05 * axis.dataLim.y1 or 1)
    if unit == "percentunit":
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif unit == "s":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{1000 * s:g} ms" if s < 1 else f"{s:g} s"))
    axis.set_xlim(0, _minutes(end, start))
    axis.set_xlabel("minutes")
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, borderaxespad=0.3)


def _heat(client: httpx.Client, axis: Axes, panel: dict[str, Any], start: float, end: float) -> None:
    series = _range(client, panel["targets"][0]["expr"], start, end)
    edges = sorted(series, key=lambda one: float(one["metric"]["le"]))
    times, table = _table([one["values"] for one in edges])
    counts = np.diff(table, axis=0, prepend=0).clip(min=0)
    used = [i for i in range(len(edges)) if counts[i].any()]
    shown = slice(0, used[-1] + 1)
    mesh = axis.pcolormesh(
        [_minutes(at, start) for at in times],
        np.arange(len(edges))[shown],
        counts[shown],
        cmap="Blues",
        norm=PowerNorm(0.4, vmin=0),  # so that phases with few requests are visible too
        rasterized=True,
    )
    labels = [f"{float(one['metric']['le']):g}" for one in edges][shown]
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(False)
    axis.set_xlabel("minutes")
    axis.figure.colorbar(mesh, ax=axis, label=f"in {WINDOW}")


def _table(series: list[list[tuple[float, str]]]) -> tuple[list[float], np.ndarray]:
    """The times of all series, and their values ``[series, times]``; 0 where a series has no value."""
    by_time = [{at: float(value) for at, value in values} for values in series]
    times = sorted(set().union(*by_time))
    return times, np.array([[values.get(at, 0.0) for at in times] for values in by_time])


def _range(client: httpx.Client, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    query = expression.replace("$__rate_interval", WINDOW).replace("$instance", ".+")
    reply = client.get("/api/v1/query_range", params={"query": query, "start": start, "end": end, "step": STEP_S})
    found: list[dict[str, Any]] = reply.raise_for_status().json()["data"]["result"]
    return found


def _legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _minutes(at: float, start: float) -> float:
    return (datetime.fromtimestamp(at, UTC) - datetime.fromtimestamp(start, UTC)).total_seconds() / 60


if __name__ == "__main__":
    main()
