"""The pictures of docs/operations.md: main panels of the dashboards, drawn from what a Prometheus has recorded.

    python docs/panels.py http://127.0.0.1:9090 --seconds 600

Asks what Grafana would ask (the committed dashboards' own queries), and draws it with matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

HERE = Path(__file__).parent
DASHBOARDS = HERE.parent / "deploy/grafana/dashboards"
STEP_S, WINDOW = 5, "30s"
PICTURES = {
    "slr-overview": ("Requests by outcome", "Latency", "Exit reasons", "Iterations"),
    "slr-stability": (
        *("Iterations", "Iterations saved by early exit", "Relative change by iteration, median"),
        *("Contraction by iteration, median", "Share expanding by iteration", "State norm by iteration, mean"),
    ),
    "slr-latency": ("Mean time by stage", "Time to first token", "Answers in a step", "Step duration"),
    "slr-capacity": ("Slots", "Waiting", "Busy", "Work"),
}


def main() -> None:
    """Draw a picture per dashboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where Prometheus listens")
    parser.add_argument("--seconds", type=float, default=600, help="how far back")
    parser.add_argument("--until", type=float, default=None, help="Unix time of the end (default: now)")
    options = parser.parse_args()
    end = options.until or time.time()
    plt.rcParams.update(
        {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "slr", "svg.fonttype": "none"}
    )
    with httpx.Client(base_url=options.url, timeout=30) as client:
        for name, titles in PICTURES.items():
            dashboard = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
            panels = {panel["title"]: panel for panel in reversed(dashboard["panels"])}
            rows = (len(titles) + 1) // 2
            figure, axes = plt.subplots(rows, 2, figsize=(11, 2.7 * rows), layout="constrained")
            for axis, title in zip(axes.flat, titles, strict=True):
                draw(client, axis, panels[title], end - options.seconds, end)
            figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def draw(client: httpx.Client, axis: Axes, panel: dict[str, Any], start: float, end: float) -> None:
    """One panel."""
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
    # What is not a number is not there yet; what is nothing has no place in a stack.
    seen = [
        curve
        for curve, ys in zip(curves, values, strict=True)
        if any(map(np.nan_to_num if stacked else np.isfinite, ys))
    ]
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(2, len(seen)))) if len(seen) > 5 else None
    if stacked:
        moments, heights = _table([points for _, points in seen])
        axis.stackplot([_minutes(at, start) for at in moments], heights, labels=[name for name, _ in seen], alpha=0.7)
    else:
        for place, (name, points) in enumerate(seen):
            color = None if colors is None else colors[place]
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
    moments, table = _table([one["values"] for one in edges])
    counts = np.diff(table, axis=0, prepend=0).clip(min=0)
    used = [place for place in range(len(edges)) if counts[place].any()]
    shown = slice(0, used[-1] + 1)
    mesh = axis.pcolormesh(
        [_minutes(at, start) for at in moments],
        np.arange(len(edges))[shown],
        counts[shown],
        cmap="Blues",
        vmin=0,
        rasterized=True,
    )
    labels = [f"{float(one['metric']['le']):g}" for one in edges][shown]
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(False)
    axis.set_xlabel("minutes")
    axis.figure.colorbar(mesh, ax=axis, label=f"in {WINDOW}")


def _table(series: list[list[tuple[float, str]]]) -> tuple[list[float], np.ndarray]:
    """The moments of all series, and their values ``[series, moments]``; 0 where one has none."""
    by_time = [{at: float(value) for at, value in values} for values in series]
    moments = sorted(set().union(*by_time))
    return moments, np.array([[values.get(at, 0.0) for at in moments] for values in by_time])


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
