"""Rows of figures, for the terminal and for a report alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slr_core.evaluation.statistics import Summary

NOTHING = "-"


@dataclass(frozen=True)
class FigureTable:
    """Columns by name, and rows of as many cells. A column that says nothing in any row is left out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _optional(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


_ACCURACY: dict[str, Callable[[Summary], str]] = {
    "accuracy": lambda s: f"{s.accuracy:.3f}",
    "95 % interval": lambda s: f"{s.interval[0]:.3f} to {s.interval[1]:.3f}",
}
_LOOP: dict[str, Callable[[Summary], str]] = {
    "iterations": lambda s: f"{s.iterations:.2f}",
    "converged": lambda s: f"{s.converged:.1%}" if s.iterations else NOTHING,
    "diverged": lambda s: f"{s.diverged:.1%}" if s.diverged else NOTHING,
    "passes": lambda s: f"{s.forward_passes:.2f}",
    "tokens": lambda s: f"{s.tokens:.1f}",
    "MFLOPs": lambda s: _optional(None if s.flops is None else s.flops / 1e6, ",.1f"),
    "ms": lambda s: f"{s.seconds * 1000:.1f}",
}


def method_table(summaries: Mapping[str, Summary], p: Mapping[str, float]) -> FigureTable:
    """One row a method; ``p`` has the paired tests against the loop."""
    figures: dict[str, Callable[[str, Summary], str]] = {
        "method": lambda name, _: name,
        **{column: _of(figure) for column, figure in _ACCURACY.items()},
        "p against slr": lambda name, _: _optional(p.get(name), ".3g"),
        "steps hold": lambda _, s: _optional(s.steps_hold, ".3f"),
        **{column: _of(figure) for column, figure in _LOOP.items()},
        "added parameters": lambda _, s: _optional(s.added_parameters, ","),
    }
    return _table(figures, summaries)


def difficulty_table(levels: Mapping[int, Summary], overall: Summary | None = None) -> FigureTable:
    """One row a number of reasoning steps, and one of all questions if it is given."""
    figures: dict[str, Callable[[str, Summary], str]] = {
        "steps": lambda level, _: level,
        "questions": lambda _, s: str(s.questions),
        **{column: _of(figure) for column, figure in (_ACCURACY | _LOOP).items()},
    }
    rows = {str(level): summary for level, summary in levels.items()}
    return _table(figures, rows if overall is None else {**rows, "all": overall})


def _of(figure: Callable[[Summary], str]) -> Callable[[str, Summary], str]:
    return lambda _, summary: figure(summary)


def _table(figures: Mapping[str, Callable[[str, Summary], str]], summaries: Mapping[str, Summary]) -> FigureTable:
    columns = {column: [cell(name, s) for name, s in summaries.items()] for column, cell in figures.items()}
    said = {column: cells for column, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    return FigureTable(tuple(said), tuple(zip(*said.values(), strict=True)))
