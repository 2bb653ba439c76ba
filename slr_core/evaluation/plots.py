"""Plots as SVG text, for a page or a file. The same data give the same text.

Plots are readable on light and dark pages: backgrounds are transparent, axes and text are grey. The colours are those
of Okabe and Ito, which colour-blind readers can distinguish; markers and strokes differ, too.
"""

# Over 400 lines: all plots share one style and its helpers.
from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from math import ceil
from typing import TYPE_CHECKING, Any

from slr_core._install import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from slr_core.evaluation.lens import Lens, Movement, Point, Quartiles, QuestionReadings, Trajectories
    from slr_core.evaluation.probes import ProbeScore
    from slr_core.evaluation.stability import ExitPoint
    from slr_core.evaluation.statistics import Summary

GREY = "#7b7b7b"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STROKES = ("-", "--", "-.", ":")
WIDTH = 6.4
"""Width of a figure, in inches."""

_STYLE: Any = {  # matplotlib's stubs require literal names
    "svg.hashsalt": "slr",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may contain dollar signs
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """A plot of a report: title, caption and SVG."""

    title: str
    caption: str
    svg: str


# -- plots of answers -----------------------------------------------------------------------------------


def draw_accuracy_by_depth(
    by_depth: Mapping[int, Summary], trained: int, rules: Mapping[str, float] | None = None
) -> str:
    """Draw accuracy with its 95 % interval, contraction rate and shares of oscillating and diverged loops by depth."""
    depths = sorted(by_depth)
    with _drawing("Accuracy against forced iterations", 4.6) as (figure, svg):
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _banded(axes, depths, [by_depth[t].accuracy for t in depths], [by_depth[t].interval for t in depths], 0)
        axes.axvline(trained, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"trained: {trained}", (trained, 1), (4, 1), xycoords=("data", "axes fraction"), textcoords="offset points"
        )
        _rules(axes, rules or {})
        axes.set(ylabel="accuracy", ylim=(0, 1.03))
        moved = [(t, rate) for t in depths if (rate := by_depth[t].contraction_rate) is not None]
        below.plot(*_transposed(moved), label="contraction rate", **_line(1))
        below.plot(depths, [by_depth[t].oscillating for t in depths], label="share oscillating", **_line(2))
        below.plot(depths, [by_depth[t].diverged for t in depths], label="share diverged", **_line(3))
        below.set(xlabel="iterations")
        below.set_ylim(bottom=-0.03)
        _whole_numbers(below)
        _legend(figure, below)
    return svg()


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve of :func:`draw_curves`: ``y`` at ``x``, with its interval."""

    x: float
    y: float
    interval: tuple[float, float]


def draw_curves(
    curves: Mapping[str, Sequence[CurvePoint]],
    *,
    title: str,
    x_label: str,
    y_label: str = "accuracy",
    log_x: bool = False,
) -> str:
    """Draw a share, 0 to 1, against a quantity: a line with its interval per name."""
    with _drawing(title) as (figure, svg):
        axes = _axes(figure)
        for i, (name, points) in enumerate(curves.items()):
            _banded(axes, [p.x for p in points], [p.y for p in points], [p.interval for p in points], i, name)
        if log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({p.x for points in curves.values() for p in points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(-0.02, 1.03))
        _legend(figure, axes, columns=2 if max(map(len, curves), default=0) > 20 else 4)
    return svg()


def draw_exit_frontier(exits: Sequence[ExitPoint], default: Summary | None = None) -> str:
    """Draw accuracy against mean iterations: a line per criterion over its thresholds, and the loop as configured."""
    with _drawing("Accuracy against mean iterations, by exit criterion") as (figure, svg):
        axes = _axes(figure)
        for i, criterion in enumerate(dict.fromkeys(e.criterion for e in exits)):
            points = sorted((e.iterations, e.accuracy) for e in exits if e.criterion == criterion)
            axes.plot(*_transposed(points), label=criterion.replace("_", " "), **_line(i))
        if default is not None:
            point: dict[str, Any] = {"marker": "*", "markersize": 12, "linestyle": "none", "color": GREY}
            axes.plot([default.iterations], [default.accuracy], label="as configured", **point)
        axes.set(xlabel="mean iterations", ylabel="accuracy")
        _legend(figure, axes)
    return svg()


def draw_noise_sensitivity(noise: Mapping[float, tuple[Summary, float]], default: Summary | None = None) -> str:
    """Draw accuracy and the share of changed answers against the noise in h_0."""
    scales = sorted(noise)
    with _drawing("Sensitivity to noise in the first state") as (figure, svg):
        axes = _axes(figure)
        summaries = [noise[scale][0] for scale in scales]
        _banded(axes, scales, [s.accuracy for s in summaries], [s.interval for s in summaries], 0, "accuracy")
        axes.plot(scales, [noise[scale][1] for scale in scales], label="answers changed", **_line(1))
        if default is not None:
            axes.axhline(default.accuracy, color=GREY, linestyle=":", linewidth=1, label="accuracy without noise")
        axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
        axes.set(xlabel="noise, as a share of the state's RMS", ylabel="share of questions", ylim=(-0.03, 1.03))
        _legend(figure, axes)
    return svg()


def draw_methods(
    summaries: Mapping[str, Summary], *, controls: Iterable[str] = (), rules: Mapping[str, float] | None = None
) -> str:
    """Draw the accuracy of every method with its 95 % interval; controls are hollow, shortcut rules are lines."""
    names, hollow = list(summaries), set(controls)
    with _drawing("Accuracy of the methods, with 95 % intervals", 0.9 + 0.28 * len(names)) as (figure, svg):
        axes = _axes(figure)
        for place, name in enumerate(names):
            summary, control = summaries[name], name in hollow
            low, high = summary.interval
            colour = COLOURS[1 if control else 0]
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
            axes.plot(
                [summary.accuracy],
                [place],
                "o",
                color=colour,
                markersize=6,
                markerfacecolor="none" if control else colour,
            )
            axes.annotate(f"{summary.accuracy:.3f}", (1.02, place), xycoords=("axes fraction", "data"), va="center")
        _rules(axes, rules or {}, upright=True)
        axes.set_yticks(range(len(names)), [name + (" (control)" if name in hollow else "") for name in names])
        axes.set(xlabel="accuracy", xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
    return svg()


# -- plots of states ------------------------------------------------------------------------------------


def draw_change_and_contraction(moved: Movement) -> str:
    """Draw relative change and contraction per iteration: medians and quartiles."""
    with _drawing("Steps of the state, medians and quartiles", 2.7) as (figure, svg):
        left, right = figure.subplots(1, 2)
        _quartiles(left, moved.relative_change, 0)
        left.set(title="relative change", xlabel="iteration", ylabel="step / state before")
        left.set_ylim(bottom=0)
        _quartiles(right, moved.contraction, 1)
        right.axhline(1, color=GREY, linestyle="--", linewidth=1)
        right.set(title="contraction; below 1, steps shrink", xlabel="iteration", ylabel="step / step before")
        right.set_ylim(bottom=0)
    return svg()


def draw_probe_scores(scores: Sequence[ProbeScore]) -> str:
    """Draw the score of each probe per iteration: a panel per label and place, with shuffled labels and chance."""
    panels = list(dict.fromkeys((s.label, s.place) for s in scores))
    several_places = len({place for _, place in panels}) > 1
    kinds = list(dict.fromkeys(s.probe for s in scores))
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = max(1, ceil(len(panels) / columns))
    last = max((s.t for s in scores), default=0)
    with _drawing("Probes on latent states, per iteration", 0.6 + 2.2 * rows) as (figure, svg):
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, (label, place) in zip(grid, panels, strict=False):
            panel = [s for s in scores if (s.label, s.place) == (label, place)]
            for i, kind in enumerate(kinds):
                same_kind = [s for s in panel if s.probe == kind]
                times = [s.t for s in same_kind]
                _banded(axes, times, [s.score for s in same_kind], [s.interval for s in same_kind], i, kind)
                axes.plot(
                    times,
                    [s.shuffled for s in same_kind],
                    ":",
                    color=COLOURS[i],
                    linewidth=1.2,
                    label=f"{kind}, shuffled labels",
                )
            chance = sorted({(s.t, s.chance) for s in panel})
            axes.plot(*_transposed(chance), "--", color=GREY, linewidth=1, label="chance")
            axes.set(title=f"{label}, {place}" if several_places else label, xlabel="iteration", ylim=(0, 1.04))
            axes.set_xlim(-0.3, last + 0.3)
            _whole_numbers(axes)
            axes.set_ylabel(panel[0].metric)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        _legend(figure, grid[0], columns=5)
    return svg()


def draw_lens_curves(lens: Lens) -> str:
    """Draw the logit lens per iteration: probability of the answer and of the frontier, and entropy."""
    with _drawing("Logit lens, per iteration", 3.0) as (figure, svg):
        left, right = figure.subplots(1, 2)
        times = [r.t for r in lens.readings]
        left.plot(times, [r.answer for r in lens.readings], label="p(answer's first token)", **_line(0))
        left.plot(times, [r.settled for r in lens.readings], label="share where it is the top token", **_line(1))
        reached = [(r.t, r.frontier) for r in lens.readings if r.frontier is not None]
        if reached:
            left.plot(*_transposed(reached), label="p(frontier at distance t)", **_line(2))
        left.set(title="probability of the answer", xlabel="iteration", ylabel="mean", ylim=(-0.03, 1.04))
        for i, (level, readings) in enumerate(lens.by_difficulty.items()):
            name = f"{level} steps" if len(lens.by_difficulty) > 1 else None
            right.plot([r.t for r in readings], [r.entropy for r in readings], label=name, **_line(i))
        right.set(title="entropy, by difficulty", xlabel="iteration", ylabel="nats")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            _whole_numbers(axes)
            _legend_below(axes)
    return svg()


def draw_readings(questions: Sequence[QuestionReadings]) -> str:
    """Draw a column per question: the top token of every state (darker: more likely) and the decoded thought."""
    rows = max((question.first + len(question.readings) for question in questions), default=1)
    has_thoughts = any(thought for question in questions for thought in question.thoughts)
    with _drawing("Top token of every state", 0.9 + (0.36 if has_thoughts else 0.24) * rows) as (figure, svg):
        axes = _axes(figure)
        for column, question in enumerate(questions):
            for t, (token, p) in enumerate(question.readings, start=question.first):
                lines = [f"{_short(token.strip())}  {p:.2f}"]
                if 0 < t <= len(question.thoughts) and question.thoughts[t - 1] is not None:
                    lines.append(f"\u201c{_short(str(question.thoughts[t - 1]))}\u201d")
                axes.fill_between([column, column + 0.96], t - 0.46, t + 0.46, color=COLOURS[0], alpha=0.3 * p, lw=0)
                axes.text(column + 0.03, t, "\n".join(lines), va="center", fontsize=8)
            end = f"{_short(question.text)} ({'right' if question.right else 'wrong'})"
            axes.text(column + 0.03, rows, end, va="center", fontsize=8, weight="bold")
        axes.set(ylabel="iteration", xlim=(0, max(1, len(questions))), ylim=(rows + 0.5, -0.5), xticks=[])
        axes.set_yticks(range(rows))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return svg()


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "\u2026"


def draw_pca_trajectories(paths: Trajectories) -> str:
    """Draw states in the plane of their principal components: single paths, and the mean path per difficulty."""
    levels = list(paths.paths)
    with _drawing("States in the plane, mean path per difficulty", 4.4) as (figure, svg):
        axes = _axes(figure)
        for level, path in paths.points:
            axes.plot(*_transposed(path), color=COLOURS[levels.index(level) % len(COLOURS)], linewidth=0.4, alpha=0.25)
        for i, level in enumerate(levels):
            xs, ys = _transposed(paths.paths[level])
            axes.plot(xs, ys, label=f"{level} steps", **_line(i))
            for t, (x, y) in _labelled_points(list(enumerate(zip(xs, ys, strict=True), start=paths.first)), axes):
                axes.annotate(
                    str(t), (x, y), (4, 3), textcoords="offset points", fontsize=7, color=COLOURS[i % len(COLOURS)]
                )
        first, second = paths.explained
        axes.set(
            xlabel=f"first component, {first:.0%} of the variance",
            ylabel=f"second component, {second:.0%}",
        )
        _legend(figure, axes)
    return svg()


# -- drawing ----------------------------------------------------------------------------------------------


@contextmanager
def _drawing(title: str, height: float = 3.4) -> Iterator[tuple[Figure, Callable[[], str]]]:
    """A figure to draw on, and a function that returns its SVG after the block."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("plotting", "eval", error) from error
    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        # Without pyplot, which has global state.
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, lambda: _embeddable(text.getvalue(), title)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=empty)


def _embeddable(text: str, title: str) -> str:
    """The ``<svg>`` element alone, with a label for screen readers, at most as wide as its page."""
    text = text[text.index("<svg") :]
    named = f'<svg role="img" aria-label="{escape(title)}" style="max-width: 100%; height: auto"'
    text = named + text[len("<svg") :]
    # Numbered ids would occur twice on a page with two plots, and nothing refers to them. Other ids are hashes of the
    # content.
    return re.sub(r'<g id="[^"]*_\d+"', "<g", text)


def _axes(figure: Figure) -> Axes:
    return figure.add_subplot()


def _line(i: int) -> dict[str, Any]:
    """Colour, marker and stroke of the line with index ``i``."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": STROKES[i // len(COLOURS) % len(STROKES)],
    }


def _banded(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    i: int,
    label: str | None = None,
) -> None:
    lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
    axes.fill_between(xs, lows, highs, color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
    axes.plot(xs, ys, label=label, **_line(i))


def _quartiles(axes: Axes, spreads: Sequence[Quartiles | None], i: int) -> None:
    known = [(t, s) for t, s in enumerate(spreads, start=1) if s is not None]
    times = [t for t, _ in known]
    _banded(axes, times, [s.median for _, s in known], [(s.low, s.high) for _, s in known], i)
    axes.set_xlim(0.7, len(spreads) + 0.3)
    _whole_numbers(axes)


def _rules(axes: Axes, rules: Mapping[str, float], *, upright: bool = False) -> None:
    for name, score in rules.items():
        style: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
        where: dict[str, Any]
        if upright:
            axes.axvline(score, **style)
            where = {"xy": (score, 1), "xytext": (3, 2), "xycoords": ("data", "axes fraction")}
        else:
            axes.axhline(score, **style)
            where = {"xy": (1, score), "xytext": (0, 3), "xycoords": ("axes fraction", "data"), "ha": "right"}
        axes.annotate(f"shortcut rule {name}", textcoords="offset points", fontsize=8, **where)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Put a legend below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _legend_below(axes: Axes) -> None:
    """Put a legend below one of several axes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22))


def _labelled_points(places: Sequence[tuple[int, Point]], axes: Axes) -> Iterator[tuple[int, Point]]:
    """The points that are far enough from the previous labelled one to have a label."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    last: Point | None = None
    for t, (x, y) in places:
        if last is None or abs(x - last[0]) > 0.02 * (right - left) or abs(y - last[1]) > 0.03 * (high - low):
            yield t, (x, y)
            last = x, y


def _transposed(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]
