"""The tables of docs/findings.md, in Markdown, from rows of finished runs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from slr_core.evaluation.statistics import wilson_interval

Row = dict[str, Any]
_FEW_DEPTHS = 3  # numbers of forced iterations that fit beside each other for every set of questions
_RECIPE, _FROZEN = "as it is", "frozen base"
"""Variants that others are compared with; the names of those on a frozen base begin with the second."""


@dataclass(frozen=True)
class Pooled:
    """The figures of one cell: all seeds of a variant on one set of questions by one method.

    Attributes:
        mean: mean accuracy of the seeds.
        lowest, highest: of the seeds.
        interval: 95 % Wilson interval, the answers of all seeds pooled.
        seeds: number of seeds.
    """

    mean: float
    lowest: float
    highest: float
    interval: tuple[float, float]
    seeds: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Pooled:
        """The figures of the seeds' rows."""
        scores, n = [row["accuracy"] for row in rows], sum(row["questions"] for row in rows)
        right = sum(round(row["accuracy"] * row["questions"]) for row in rows)
        return cls(fmean(scores), min(scores), max(scores), wilson_interval(right, n), len(rows))

    def __str__(self) -> str:
        spread = f"; seeds {self.lowest:.3f} to {self.highest:.3f}" if self.seeds > 1 else ""
        return f"{self.mean:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f}{spread})"


def column_name(row: Row) -> str:
    """The name of a set of questions, with the number of iterations if it was forced."""
    name = row["name"] or row["question_set"].partition(";")[0]
    depth = row["loop"].get("max_iterations")
    return name if depth is None else f"{name}, {depth} iterations"


def grouped(rows: Sequence[Row], *keys: Callable[[Row], Any]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of the keys, in the order of their first occurrence."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(key(row) for key in keys)].append(row)
    return groups


def variant_name(row: Row) -> str:
    """The name of a variant; of settings that vary, the last part of their dotted names."""
    return re.sub(r"(?:\w+\.)+(?=\w+=)", "", str(row["variant"])) or "as the recipe"


def _accuracy_table(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    depths = list(dict.fromkeys(row["loop"].get("max_iterations") for row in rows))
    if len(depths) > _FEW_DEPTHS:
        return [_depth_table(rows, depths)]
    cells = grouped(rows, variant_name, column_name)
    columns = list(dict.fromkeys(map(column_name, rows)))
    body = []
    for (name,), of in grouped(rows, variant_name).items():
        seeds = str(len({row["seed"] for row in of}))
        body.append([name, seeds, *(_cell(cells.get((name, column), [])) for column in columns)])
    return [_markdown(["", "seeds", *columns], body)]


def _depth_table(rows: Sequence[Row], depths: Sequence[int | None]) -> str:
    """A row per model and set of questions, a column per number of iterations; ``None``: those of its own exit."""
    many = len(set(map(variant_name, rows))) > 1
    body = []
    for (variant, name), of in grouped(rows, variant_name, lambda row: row["name"]).items():
        at = grouped(of, lambda row: row["loop"].get("max_iterations"))
        body.append([f"{variant}, {name}" if many else str(name), *(_cell(at.get((depth,), [])) for depth in depths)])
    return _markdown(["iterations", *("own exit" if depth is None else str(depth) for depth in depths)], body)


def _cell(rows: Sequence[Row]) -> str:
    return str(Pooled.of(rows)) if rows else "-"


def _methods_table(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    tables = []
    head = ["model", "method", "seeds", "accuracy (95 % interval)", "tokens", "passes", "MFLOPs", "ms"]
    for (column,), of in grouped(rows, column_name).items():
        body = []
        for (name, method), same in grouped(of, variant_name, lambda row: row["method"]).items():
            means = [fmean(row[key] for row in same) for key in ("tokens", "forward_passes", "flops", "seconds")]
            cost = [f"{means[0]:.1f}", f"{means[1]:.1f}", f"{means[2] / 1e6:,.1f}", f"{means[3] * 1000:.1f}"]
            body.append([name, method, str(len(same)), str(Pooled.of(same)), *cost])
        tables += [f"{column}:", _markdown(head, body)]
    return tables


# -- states -----------------------------------------------------------------------------------------------


def effect(recipe: Sequence[Row], variant: Sequence[Row]) -> float | None:
    """Accuracy of a variant less that of the recipe, if they differ by the page's test.

    Args:
        recipe: a row per seed, on one set of questions.
        variant: the same of the variant.

    Returns:
        Difference of the means; ``None`` unless every seed lies on the same side of the recipe's run of that seed,
        and the intervals of the pooled answers do not overlap. A single seed shows no difference.
    """
    scores = {row["seed"]: row["accuracy"] for row in recipe}
    pairs = [(scores[row["seed"]], row["accuracy"]) for row in variant if row["seed"] in scores]
    without, with_it = Pooled.of(recipe), Pooled.of(variant)
    above = all(a < b for a, b in pairs) and with_it.interval[0] > without.interval[1]
    below = all(a > b for a, b in pairs) and with_it.interval[1] < without.interval[0]
    return with_it.mean - without.mean if len(pairs) > 1 and (above or below) else None


def effects_table(studies: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """The variants that differ from the recipe, by study, set of questions and depth.

    Args:
        studies: a title, and rows at the trained depth and at multiples of it, the same for all. Those without a
            recipe to compare with are left out.
    """
    body, times = [], list[str]()
    for title, rows in studies:
        for (recipe, name), of in grouped(rows, _recipe_of, lambda row: row["name"]).items():
            runs = grouped(of, lambda row: row["loop"]["max_iterations"], variant_name)
            depths = sorted({depth for depth, _ in runs})
            if (depths[0], recipe) in runs:
                times = ["trained depth", *(f"{depth // depths[0]}x" for depth in depths[1:])]
                at = ({variant: run for (depth, variant), run in runs.items() if depth == d} for d in depths)
                body.append([title, recipe, name, *(_effects_cell(by_variant, recipe) for by_variant in at)])
    return _markdown(["study", "compared with", "questions", *times], body)


def _recipe_of(row: Row) -> str:
    """The variant of the same study that differs in one setting only."""
    return _FROZEN if row["variant"].startswith(_FROZEN) else _RECIPE


def _effects_cell(runs: dict[str, list[Row]], recipe: str) -> str:
    found = {name.removeprefix(f"{_FROZEN}, "): effect(runs[recipe], of) for name, of in runs.items()}
    shown = [f"{name} {points * 100:+.0f}" for name, points in found.items() if points is not None]
    return "; ".join([f"{Pooled.of(runs[recipe]).mean:.2f}", *shown])


def _patching_table(record: dict[str, Any]) -> list[str]:
    head = ["h_t is replaced by", "t", "own answer", "rival's answer (95 % interval)"]
    body = [
        [
            "nothing" if row["patch"] is None else row["patch"].replace("_", " "),
            "-" if row["t"] is None else str(row["t"]),
            f"{row['own']:.3f}",
            f"{row['rival']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})",
        ]
        for row in record["rows"]
    ]
    return [_markdown(head, body)]


def _lens_table(record: dict[str, Any]) -> list[str]:
    probes = {score["t"]: score for score in record["probes"] if score["label"] == "frontier"}
    head = ["t", "logit lens: probability on the frontier", "probe: ranking precision (95 % interval)"]
    head += ["probe, shuffled labels", "logit lens: first token on top"]
    body = []
    for reading in record["lens"]:
        probe = probes.get(reading["t"])
        frontier = "-" if reading["frontier"] is None else f"{reading['frontier']:.3f}"
        cells = ["-", "-"]
        if probe is not None:
            low, high = probe["interval"]
            cells = [f"{probe['score']:.3f} ({low:.3f} to {high:.3f})", f"{probe['shuffled']:.3f}"]
        body.append([str(reading["t"]), frontier, *cells, f"{reading['settled']:.3f}"])
    return [_markdown(head, body)]


def _steps_table(record: dict[str, Any]) -> list[str]:
    head = ["t", "decoded thought is step t (95 % interval)", "logit lens: first token on top"]
    body = []
    for reading in record["lens"]:
        share, n = reading["thought_is_step"], reading["questions"]
        cell = "-"
        if share is not None:
            low, high = wilson_interval(round(share * n), n)
            cell = f"{share:.3f} ({low:.3f} to {high:.3f})"
        body.append([str(reading["t"]), cell, f"{reading['settled']:.3f}"])
    return [_markdown(head, body)]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "accuracy": _accuracy_table,
    "methods": _methods_table,
    "patching": _patching_table,
    "lens": _lens_table,
    "steps": _steps_table,
}


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
