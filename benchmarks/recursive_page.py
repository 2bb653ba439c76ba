"""The tables and plots of docs/recursive.md, from the rows of benchmarks/recursive.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import exp
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from slr_core.evaluation.plots import CurvePoint, draw_curves

PAGE = Path(__file__).parents[1] / "docs/recursive.md"
Row = dict[str, Any]


def build_page(rows: list[Row]) -> None:
    """Replace the tables of the page, and draw its plots."""
    text = PAGE.read_text(encoding="utf-8")
    p_hop = [row for row in rows if row["task"] == "p_hop"]
    for name, lines in (
        ("models", table(p_hop)),
        ("others", others(row for row in rows if row["task"] != "p_hop")),
        ("start", starts(rows)),
        ("exits", exit_table(p_hop)),
    ):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + "\n".join(lines) + "\n" + end + tail
    PAGE.write_text(text, encoding="utf-8")
    curves = {
        row["model"]: [CurvePoint(step, exp(-loss), (exp(-loss),) * 2) for step, loss in row["training_loss"]]
        for row in p_hop
        if row["seed"] == 0 and row["model"].startswith("2 layers x 2, rank 8")
    }
    title = "Answer in training, rank 8: from the decomposition, and from random adapters"
    save_plot("recursive", curves, title, "step", "exp(-loss), mean probability of a token")
    curves = {same[0]["model"]: [point(same, i, "layer_passes") for i in used(same[0])] for same in by_model(p_hop)}
    save_plot("recursive_compute", curves, "p-hop: accuracy against compute", "layer passes a token", "accuracy")
    curves = {}
    for same in by_model(p_hop):
        name = same[0]["model"]
        family = "2 x 2, by rank" if same[0].get("before") and name.startswith("2") else name
        curves.setdefault(family, []).append(point(same, used(same[0])[-1], "parameters"))
    curves = {name: sorted(points, key=attrgetter("x")) for name, points in curves.items()}
    save_plot("recursive_parameters", curves, "p-hop: accuracy against parameters", "parameters", "accuracy")


def save_plot(name: str, curves: dict[str, list[CurvePoint]], title: str, x_label: str, y_label: str) -> None:
    """Draw curves beside the page."""
    if curves:
        drawn = draw_curves(curves, title=title, x_label=x_label, y_label=y_label)
        (PAGE.parent / f"{name}.svg").write_text(drawn, encoding="utf-8")


def used(row: Row) -> range:
    """Places in ``by_iteration`` of the iterations that the model was trained for."""
    return range(max(1, row["loops"]))


def point(same: list[Row], i: int, x: str) -> CurvePoint:
    """Mean accuracy of one model's seeds after some iterations, with the lowest and the highest."""
    values = [row["by_iteration"][i]["accuracy"] for row in same]
    first = same[0]
    return CurvePoint(first.get(x) or first["by_iteration"][i][x], fmean(values), (min(values), max(values)))


def table(rows: list[Row]) -> Iterator[str]:
    """Accuracy and loss by number of iterations."""
    yield "| model | seeds | parameters | steps | t | layer passes a token | loss | accuracy |"
    yield "|---|---|---|---|---|---|---|---|"
    for same in by_model(rows):
        first = same[0]
        for i, at in enumerate(first["by_iteration"]):
            name = (
                f"{first['model']} | {len(same)} | {first['parameters']:,} | {first['steps']}" if i == 0 else " | | | "
            )
            past = " (past its depth)" if first["loops"] and at["t"] > first["loops"] else ""
            t = "–" if first["loops"] == 0 else f"{at['t']}{past}"
            yield f"| {name} | {t} | {at['layer_passes']} | {spread(same, i, 'loss')} | {spread(same, i, 'accuracy')} |"


def spread(same: list[Row], i: int, key: str) -> str:
    """Mean of the seeds, and the standard deviation between them."""
    values = [row["by_iteration"][i][key] for row in same]
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def others(rows: Iterable[Row]) -> Iterator[str]:
    """The other tasks, at the trained depth."""
    yield "| task | model | parameters | steps | layer passes a token | loss | accuracy | at t = 1 |"
    yield "|---|---|---|---|---|---|---|---|"
    for same in by_model(rows):
        first, i = same[0], used(same[0])[-1]
        cells = [first["task"], first["model"], f"{first['parameters']:,}", str(first["steps"])]
        cells += [str(first["by_iteration"][i]["layer_passes"]), spread(same, i, "loss"), spread(same, i, "accuracy")]
        yield f"| {' | '.join(cells)} | {spread(same, 0, 'accuracy') if first['loops'] else '–'} |"


def starts(rows: list[Row]) -> Iterator[str]:
    """Recursive models before any training."""
    yield "| task | model | loss before training | after | accuracy before | after |"
    yield "|---|---|---|---|---|---|"
    for same in by_model(row for row in rows if "before" in row):
        t = same[0]["loops"] - 1
        cells = [
            f"{fmean(row[when][t][key] for row in same):.3f}"
            for key in ("loss", "accuracy")
            for when in ("before", "by_iteration")
        ]
        yield f"| {same[0]['task']} | {same[0]['model']} | {' | '.join(cells)} |"


def exit_table(rows: list[Row]) -> Iterator[str]:
    """Accuracy against mean iterations, by criterion."""
    yield "| model | criterion | threshold | mean iterations | accuracy |"
    yield "|---|---|---|---|---|"
    for same in by_model(row for row in rows if "exits" in row):
        for i, point in enumerate(same[0]["exits"]):
            iterations, accuracy = (fmean(row["exits"][i][key] for row in same) for key in ("iterations", "accuracy"))
            named = f"{same[0]['model']} | `{point['criterion']}` | {point['threshold']:g}"
            yield f"| {named} | {iterations:.2f} | {accuracy:.3f} |"


def by_model(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each model, in the order of their first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["model"]), []).append(row)
    yield from groups.values()
