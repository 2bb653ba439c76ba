"""Tables of figures, for the terminal and for a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slr_core.evaluation.statistics import Summary

UNDEFINED = "-"


@dataclass(frozen=True)
class FigureTable:
    """Names of columns, and rows with one cell per column. A column without a value in any row is left out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _format(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else format(value, form)


_ACCURACY: dict[str, Callable[[Summary], str]] = {
    "accuracy": lambda s: f"{s.accuracy:.3f}",
    "95 % interval": lambda s: f"{s.interval[0]:.3f} to {s.interval[1]:.3f}",
}
_LOOP: dict[str, Callable[[Summary], str]] = {
    "iterations": lambda s: f"{s.iterations:.2f}",
    "converged": lambda s: f"{s.converged:.1%}" if s.iterations else UNDEFINED,
    "diverged": lambda s: f"{s.diverged:.1%}" if s.diverged else UNDEFINED,
    "passes": lambda s: f"{s.forward_passes:.2f}",
    "tokens": lambda s: f"{s.tokens:.1f}",
    "MFLOPs": lambda s: _format(None if s.flops is None else s.flops / 1e6, ",.1f"),
    "time (ms)": lambda s: f"{s.seconds * 1000:.1f}",
}


def method_table(summaries: Mapping[str, Summary], p: Mapping[str, float]) -> FigureTable:
    """One row per method; ``p`` holds the p-values of the paired tests with the loop."""
    figures: dict[str, Callable[[str, Summary], str]] = {
        "method": lambda name, _: name,
        **{column: _by_summary(figure) for column, figure in _ACCURACY.items()},
        "p (paired with slr)": lambda name, _: _format(p.get(name), ".3g"),
        "valid steps": lambda _, s: _format(s.steps_hold, ".3f"),
        **{column: _by_summary(figure) for column, figure in _LOOP.items()},
        "added parameters": lambda _, s: _format(s.added_parameters, ","),
    }
    return _table(figures, summaries)


def difficulty_table(levels: Mapping[int, Summary], overall: Summary | None = None) -> FigureTable:
    """One row per number of reasoning steps, and one of all questions if ``overall`` is given."""
    figures: dict[str, Callable[[str, Summary], str]] = {
        "steps": lambda level, _: level,
        "questions": lambda _, s: str(s.questions),
        **{column: _by_summary(figure) for column, figure in (_ACCURACY | _LOOP).items()},
    }
    rows = {str(level): summary for level, summary in levels.items()}
    return _table(figures, rows if overall is None else {**rows, "all": overall})


def _by_summary(figure: Callable[[Summary], str]) -> Callable[[str, Summary], str]:
    return lambda _, summary: figure(summary)


def _table(figures: Mapping[str, Callable[[str, Summary], str]], summaries: Mapping[str, Summary]) -> FigureTable:
    columns = {column: [cell(name, s) for name, s in summaries.items()] for column, cell in figures.items()}
    defined = {column: cells for column, cells in columns.items() if any(cell != UNDEFINED for cell in cells)}
    return FigureTable(tuple(defined), tuple(zip(*defined.values(), strict=True)))
