"""Figures: SVG that a page can hold, the same every time, readable on light and on dark."""

import builtins
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from slr_core.cli.probe import probe as command
from slr_core.errors import ConfigError
from slr_core.evaluation import plots, report
from slr_core.evaluation.lens import Lens, LensReading, Movement, Quartiles, QuestionReadings, Trajectories
from slr_core.evaluation.probes import ProbeScore
from slr_core.evaluation.stability import ExitPoint
from slr_core.evaluation.statistics import Summary, wilson_interval
from slr_core.evaluation.store import Store

SVG = "{http://www.w3.org/2000/svg}"


def summary(right: int, iterations: float = 3.0) -> Summary:
    """Of 100 questions."""
    return Summary(
        questions=100,
        accuracy=right / 100,
        interval=wilson_interval(right, 100),
        steps_hold=None,
        iterations=iterations,
        converged=1.0,
        diverged=0.0,
        oscillating=0.0,
        contraction_rate=0.5,
        forward_passes=5.0,
        tokens=3.0,
        flops=None,
        added_parameters=None,
        seconds=0.1,
        relative_change=(0.5, 0.1),
    )


def reading(t: int, frontier: float | None) -> LensReading:
    return LensReading(t, 10, 0.5 / (t + 1), 0.1 * t, 0.1 * t, frontier, 5, (("w1", 1.0),), ())


def score(label: str, kind: str, t: int, place: str = "readout") -> ProbeScore:
    return ProbeScore(label, place, kind, t, "accuracy", 0.9, (0.8, 1.0), 0.3, 0.25, 70, 30)


READINGS = tuple(reading(t, 0.9 if t < 3 else None) for t in range(5))
TOLD = (
    QuestionReadings("q", "w1 w2", True, 1, (("w7", 0.5), ("w8" * 20, 1.0)), ("a thought", None)),
    QuestionReadings("r", "w3", False, 0, (("w9", 0.25),), ()),
)
FIGURES: dict[str, Callable[[], str]] = {
    "depth": lambda: plots.draw_accuracy_by_depth({t: summary(50 + 5 * t) for t in range(9)}, 4, {"depth_rule": 0.5}),
    "exits": lambda: plots.draw_exit_frontier(
        [ExitPoint(c, 0.1 * i, i + 1.0, 0.5 + 0.1 * i, 0.2) for c in ("relative_change", "kl") for i in range(4)],
        summary(90),
    ),
    "noise": lambda: plots.draw_noise_sensitivity(
        {0.01: (summary(90), 0.01), 0.1: (summary(80), 0.1), 1.0: (summary(50), 0.5)}, summary(91)
    ),
    "methods": lambda: plots.draw_methods(
        {"slr": summary(98), "no_cot": summary(52), "slr_fixed": summary(97)},
        controls=["no_cot"],
        rules={"depth_rule": 0.75},
    ),
    "steps": lambda: plots.draw_change_and_contraction(
        Movement((Quartiles(0.8, 0.9, 1.0), Quartiles(0.1, 0.2, 0.3)), (None, Quartiles(0.4, 0.5, 0.6)))
    ),
    "probes": lambda: plots.draw_probe_scores(
        [score(label, kind, t) for label in ("frontier", "distance") for kind in ("linear", "mlp") for t in range(4)]
    ),
    "lens": lambda: plots.draw_lens_curves(Lens(READINGS, {2: READINGS, 3: READINGS}, ())),
    "readings": lambda: plots.draw_readings(TOLD),
    "trajectories": lambda: plots.draw_pca_trajectories(
        Trajectories((0.5, 0.25), 1, {2: ((0.0, 0.0), (1.0, 1.0)), 3: ((0.0, 0.0), (2.0, -1.0))}, ())
    ),
}


@cache
def drawn(name: str) -> str:
    return FIGURES[name]()


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_svg_has_a_label(name):
    svg = drawn(name)
    root = ElementTree.fromstring(svg)
    assert svg.startswith("<svg ")
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") in texts(svg)
    assert root.get("viewBox")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_text_every_time(name):
    svg = drawn(name)
    assert svg == FIGURES[name]()
    assert "date" not in svg.lower()


@pytest.mark.parametrize("name", FIGURES)
def test_colours_on_light_and_dark(name):
    svg = drawn(name)
    colours = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", svg)}
    assert colours <= {colour.lower() for colour in (*plots.COLOURS, plots.GREY)}
    for node in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        # Without a fill, a text is black.
        assert re.search(r"fill: ?#", node.get("style", "") + node.get("fill", "")), node.get("style")


def test_no_colour_vanishes_on_white_or_on_black():
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (*plots.COLOURS, plots.GREY):
        least = 4.0 if colour == plots.GREY else 2.0  # text; thick lines with markers of their own
        assert 1.05 / (luminance(colour) + 0.05) > least
        assert (luminance(colour) + 0.05) / 0.05 > least


def test_figures_on_one_page_share_no_id_but_for_the_same_thing():
    seen: dict[str, str] = {}
    for figure in FIGURES.values():
        for node in ElementTree.fromstring(figure()).iter():
            if (name := node.get("id")) is not None:
                same = ElementTree.tostring(node, encoding="unicode").strip()
                assert seen.setdefault(name, same) == same


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "depth": [
            "accuracy",
            "contraction rate",
            "share oscillating",
            "share diverged",
            "iterations",
            "trained: 4",
            "shortcut rule depth_rule",
        ],
        "exits": ["relative change", "kl", "as configured", "mean iterations"],
        "noise": ["0.01", "0.1", "1", "accuracy", "answers changed", "accuracy without noise"],
        "methods": ["slr", "no_cot (control)", "slr_fixed", "0.980", "0.520", "0.970", "shortcut rule depth_rule"],
        "steps": ["relative change", "iteration"],
        "probes": ["frontier", "distance", "linear", "mlp", "linear, shuffled labels", "chance"],
        "lens": ["p(answer's first token)", "p(frontier at distance t)", "2 steps", "3 steps", "nats"],
        "trajectories": ["2 steps", "3 steps", "first component, 50% of the variance", "second component, 25%"],
    }.items(),
)
def test_a_figure_says_what_it_shows(name, expected):
    assert set(expected) <= set(texts(drawn(name)))


def heights(svg: str, colour: str) -> list[float]:
    """The y of every marker of a colour, in order; up is smaller."""
    return [
        float(use.get("y", "nan"))
        for use in ElementTree.fromstring(svg).iter(f"{SVG}use")
        if colour.lower() in use.get("style", "").lower()
    ]


def test_higher_accuracy_is_drawn_higher():
    rising = heights(drawn("depth"), plots.COLOURS[0])
    points = rising[:9]
    assert points == sorted(points, reverse=True)
    assert len(set(points)) == 9


def test_a_rule_and_the_default_are_left_out_where_there_is_none():
    assert not any(
        "shortcut" in text for text in texts(plots.draw_accuracy_by_depth({0: summary(5), 1: summary(50)}, 1))
    )
    assert "as configured" not in texts(plots.draw_exit_frontier([ExitPoint("kl", 0.1, 1.0, 0.5, 0.0)]))
    assert "accuracy without noise" not in texts(plots.draw_noise_sensitivity({0.1: (summary(5), 0.1)}))


def test_the_lens_of_a_task_without_frontiers_draws_none():
    readings = tuple(reading(t, None) for t in range(3))
    shown = texts(plots.draw_lens_curves(Lens(readings, {1: readings}, ())))
    assert not any("frontier" in text for text in shown)


def test_states_are_put_into_words_as_far_as_they_fit():
    shown = texts(drawn("readings"))
    for said in ("w7  0.50", "\u201ca thought\u201d", "w9  0.25", "w1 w2 (right)", "w3 (wrong)"):
        assert said in shown
    (cut,) = (text for text in shown if text.startswith("w8w8"))
    assert cut == f"{'w8' * 11}w\u2026  1.00"
    assert not any("None" in text for text in shown)


def test_probes_have_a_panel_per_label_and_place():
    scores = [score(label, "mlp", t, place) for label in "abcd" for place in ("readout", "mean") for t in range(3)]
    shown = texts(plots.draw_probe_scores(scores))
    assert [text for text in shown if ", readout" in text] == [f"{label}, readout" for label in "abcd"]
    assert [text for text in shown if ", mean" in text] == [f"{label}, mean" for label in "abcd"]


def test_figures_of_nothing_are_empty_and_no_error():
    for svg in (
        plots.draw_probe_scores([]),
        plots.draw_exit_frontier([]),
        plots.draw_readings([]),
        plots.draw_change_and_contraction(Movement((None, None), (None, None))),
    ):
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"


def test_a_path_that_has_settled_is_numbered_once():
    still = ((0.0, 0.0), (5.0, 5.0), (5.0001, 5.0), (5.0, 5.0001))
    shown = texts(plots.draw_pca_trajectories(Trajectories((0.9, 0.1), 11, {2: still}, ((2, still),))))
    assert [text for text in shown if text in ("11", "12", "13", "14")] == ["11", "12"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="extra `eval`"):
        FIGURES["depth"]()


# -- the command ------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    options = [
        part
        for option in ("nodes=8", "min_hops=2", "max_hops=3", "balanced=true")
        for part in ("--generator-option", option)
    ]
    return CliRunner().invoke(app, ["--task", "prosqa", "--generate", "40", *options, *arguments])


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_figures_and_json(tmp_path):
    file, folder = tmp_path / "out.json", tmp_path / "made" / "figures"
    result = run(
        "--iterations", "1", "--probes", "linear", "--shuffles", "1", "--output", str(file), "--plots", str(folder)
    )
    assert result.exit_code == 0, result.output
    assert "40 questions, 1 iterations each" in result.output
    record = json.loads(file.read_text())
    assert [r["t"] for r in record["lens"]["readings"]] == [0, 1]
    assert {s["label"] for s in record["probes"]} == {"frontier", "distance", "option", "target"}
    assert {s["probe"] for s in record["probes"]} == {"linear"}
    assert record["manifest"]["questions"] == 40
    assert sorted(path.stem for path in folder.iterdir()) == ["lens", "probes", "readings", "steps", "trajectories"]
    for figure in folder.iterdir():
        ElementTree.fromstring(figure.read_text())


def test_the_command_keeps_what_it_found_and_does_not_look_twice(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    asked = ("--limit", "4", "--iterations", "1", "--probes", "none", "--results", str(results))
    first = run(*asked)
    assert first.exit_code == 0, first.output
    kept = results.read_bytes()
    monkeypatch.setattr("slr_core.evaluation.probes.collect_states", None)
    assert run(*asked).output == first.output
    assert results.read_bytes() == kept
    pages = report.write_report(Store(results), tmp_path / "report")
    assert [path.name for path in pages[2:]] == [f"figure_1_{i}.svg" for i in (1, 2, 3, 4)]
    assert "depth\\_rule" in pages[1].read_text()


def test_the_command_can_leave_the_probes_out():
    result = run("--limit", "3", "--iterations", "1", "--probes", "none")
    assert result.exit_code == 0, result.output
    assert "logit lens" in result.output
    assert "ranking precision" not in result.output


@pytest.mark.parametrize("probes", ["", "tree", "linear,tree", "linear,linear"])
def test_the_command_refuses_probes_that_it_does_not_know(probes):
    result = run("--probes", probes)
    assert isinstance(result.exception, ConfigError)
    assert "linear, mlp" in str(result.exception)
