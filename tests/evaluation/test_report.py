"""The report: complete, of one piece, and safe whatever the results call themselves."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slr_core.errors import ConfigError, DataError
from slr_core.evaluation import plots, report
from slr_core.evaluation.lens import Lens, Movement
from slr_core.evaluation.stability import ExitPoint, StabilityReport
from slr_core.evaluation.state_analysis import StateAnalysis
from slr_core.evaluation.statistics import paired_test, summarize, wilson_interval
from slr_core.evaluation.store import Store
from tests.evaluation.asked import outcome, spec

ABOUT = {"command": "slr compare --generate 2", "python": "3", "torch": "2"}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags in order, closed as they were opened; texts of cells, and all attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that nothing closes"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def answers(right, count=2, **changes):
    return [outcome(f"{i}:a", correct=i < right, difficulty=2 + i % 2, **changes) for i in range(count)]


def fill(store, method="slr", right=1, about=ABOUT, changes=None, **fields):
    run = store.open(spec(method, **{"questions": 20, **fields}), about)
    for kept in answers(right, 20, **(changes or {})):
        store.add(run, kept)
    return run


def study():
    right = {t: replace(summarize(answers(t, 20)), iterations=float(t)) for t in range(9)}
    exits = [ExitPoint(c, 0.1 * i, 1.0 + i, 0.1 * i, 0.5) for c in ("relative_change", "kl") for i in range(4)]
    noise = {0.01: (right[8], 0.0), 1.0: (right[2], 0.75)}
    return StabilityReport(4, right, noise, right[8], 1.625, 0.8125, exits)


@pytest.fixture
def store(tmp_path):
    """Two methods, a control, a stability study, rules and missing methods."""
    made = Store(tmp_path / "results.jsonl")
    fill(made, "slr", 18, changes={"seconds": 0.0123, "iterations": 4.25})
    fill(made, "slr_fixed", 13, changes={"flops": 2.5e9, "forward_passes": 41})
    fill(made, "no_cot", 7, changes={"flops": None, "tokens": 17, "added_parameters": 0})
    asked = {name: spec(questions=20)[name] for name in ("task", "source", "questions", "questions_sha256")}
    made.save_figure("baselines", asked, {"luck_rule": 0.625}, {})
    made.save_figure(
        "missing", asked, {"cot": "it needs weights: --weights cot=DIR", "no_cot": "it was missing once"}, {}
    )
    about = {"command": "slr stability", "torch": "2"}
    settings = {"past": 2, "seed": 11}
    made.save_figure("stability", {**asked, "model": {"name": "tiny"}, "settings": settings}, study().to_json(), about)
    return made


def written(store, out):
    paths = report.write_report(store, out)
    assert sorted(paths) == sorted(out.iterdir())
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def rows_of(text):
    """Cells of the Markdown's table rows, backslashes gone."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# -- what it holds ---------------------------------------------------------------------------------------


def test_every_figure_is_in_both_versions(store, tmp_path):
    html, text = written(store, tmp_path / "out")
    cells, rows = Page(html).cells, rows_of(text)
    slr, fixed, plain = (list(run.outcomes.values()) for run in store.runs.values())
    low, high = wilson_interval(18, 20)
    expected = [
        ["slr", "0.900", f"{low:.3f} to {high:.3f}", "-", "4.25", "100.0%", "5.00", "2.0", "1.0", "12.3", "1,200"],
        [
            "slr_fixed",
            "0.650",
            None,
            f"{paired_test(slr, fixed).p:.3g}",
            "3.00",
            None,
            "41.00",
            None,
            "2,500.0",
            "10.0",
            None,
        ],
        ["no_cot", "0.350", None, f"{paired_test(slr, plain).p:.3g}", "3.00", None, "5.00", "17.0", "-", None, "0"],
    ]
    for want in expected:
        at = cells.index(want[0])
        for row in (cells[at : at + len(want)], next(row for row in rows if row[0] == want[0])):
            assert [b for a, b in zip(want, row, strict=True) if a is not None] == [a for a in want if a is not None]
    # Of the loop's 18 right ones each level has 9 of 10.
    for level in ("2", "3"):
        (row,) = (row for row in rows if row[0] == level)
        assert row[:3] == [level, "10", "0.900"]
        at = cells.index(level)
        assert cells[at : at + len(row)] == row
    for version in ("".join(Page(html).text), text.replace("\\", "")):
        assert "paired test in the table" in version, "which decides, and not whether intervals overlap"
        for said in ("20 questions", "luck_rule", "0.625", "cot: it needs weights", "words: made here"):
            assert said in version
        for said in ("1.62 more than needed", "correlation with difficulty 0.81"):
            assert said in version
        assert "it was missing once" not in version


def test_a_loop_that_is_alone_has_nothing_to_be_compared_with(tmp_path):
    store = Store()
    fill(store)
    html, text = written(store, tmp_path / "out")
    assert "<svg" not in html
    assert rows_of(text)[2][:1] == ["slr"]
    assert "p against slr" not in rows_of(text)[0]


def test_the_manifest_names_what_makes_the_figures_again(store, tmp_path):
    html, text = written(store, tmp_path / "out")
    table = rows_of(text)
    head = table.index(["command", "task", "questions", "model", "seed", "versions"])
    compared, studied = table[head + 2 :]
    assert compared == [
        "slr compare --generate 2",
        "words: made here",
        f"20, sha256 {'cd' * 8}",
        f"tiny, sha256 {'ab' * 8}",
        "0",
        "python 3, torch 2",
    ]
    assert (studied[0], studied[4], studied[5]) == ("slr stability", "11", "torch 2")
    cells = Page(html).cells
    assert cells[-12:] == [*compared, *studied]


def forced(depth, seed=11):
    """The settings of a run of the study in ``store``."""
    loop = {"criterion": "fixed", "max_iterations": depth, "min_iterations": depth}
    return {"loop": loop, "samples": 5, "seed": seed}


def test_runs_of_a_study_are_no_methods(store, tmp_path):
    before = written(store, tmp_path / "before")
    for depth in (0, 8):
        fill(store, "slr_fixed", 3, {}, settings=forced(depth), model={"name": "tiny"})
    fill(store, "noisy_start", 3, {})
    assert written(store, tmp_path / "after") == before
    assert written(Store(store.path), tmp_path / "from the file") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": forced(9)},
        {"settings": forced(3, seed=12)},
        {"model": {"name": "tiny", "dtype": "bfloat16"}},
        {"about": ABOUT},
    ],
)
def test_forced_runs_of_no_study_are_methods(tmp_path, changes):
    store = Store()
    asked = {name: spec(questions=20)[name] for name in ("task", "source", "questions", "questions_sha256")}
    of = {**asked, "model": {"name": "tiny"}, "settings": {"past": 2, "seed": 11}}
    store.save_figure("stability", of, study().to_json(), {})
    fill(store, "slr_fixed", 3, **{"about": {}, "settings": forced(3), "model": {"name": "tiny"}, **changes})
    assert rows_of(written(store, tmp_path / "out")[1])[2][:2] == ["slr_fixed", "0.150"]


def test_a_forced_run_alone_is_reported(tmp_path):
    store = Store()
    fill(store, "slr_fixed", 3, settings=forced(3))
    assert rows_of(written(store, tmp_path / "out")[1])[2][:2] == ["slr_fixed", "0.150"]


def test_what_is_not_finished_is_left_out(store, tmp_path):
    before = written(store, tmp_path / "before")
    run = store.open(spec("slr_vote", questions=20), {"command": "slr eval --method slr_vote"})
    store.add(run, outcome())
    assert written(store, tmp_path / "after") == before


def test_runs_of_one_method_are_told_apart(tmp_path):
    store = Store()
    fill(store, "no_cot", 3)
    for right, changes in enumerate(
        [
            {},
            {"settings": {"loop": {"max_iterations": 3}, "samples": 5, "seed": 0}},
            {"settings": {"loop": {}, "samples": 5, "seed": 1}, "slr": "9"},
            {"model": {"name": "tiny", "sha256": "ff" * 32}},
            {"source": "elsewhere"},
        ]
    ):
        fill(store, "slr", right, **changes)
    html, text = written(store, tmp_path / "out")
    rows = [row for row in rows_of(text) if row[0].startswith("slr (")]
    assert [row[1] for row in rows] == ["0.000", "0.050", "0.100", "0.150", "0.200"]
    assert len({row[0] for row in rows}) == 5
    for row, said in zip(rows[1:], ("max_iterations 3", "seed 1", "weights ffffffff", "source elsewhere"), strict=True):
        assert said in row[0]
    # None of several is the one to test against.
    assert "p against slr" not in rows_of(text)[0]
    assert Page(html).cells.count("no_cot") == 1


def test_runs_of_one_model_are_told_apart_by_its_precision(tmp_path):
    store = Store()
    model = spec()["model"]
    for right, chosen in enumerate(({}, {"quantization": "int8"}, {"dtype": "bfloat16"})):
        fill(store, "slr", right, model={**model, **chosen})
    rows = [row[:2] for row in rows_of(written(store, tmp_path / "out")[1]) if row[0].startswith("slr (")]
    assert rows == [
        ["slr (quantization default, dtype default)", "0.000"],
        ["slr (quantization int8, dtype default)", "0.050"],
        ["slr (quantization default, dtype bfloat16)", "0.100"],
    ]


def test_runs_that_no_setting_tells_apart_are_told_apart_by_their_ids(tmp_path):
    store = Store()
    alike = [fill(store, "slr", right, other=right) for right in (1, 2)]
    hashes = ["abababab" + end * 56 for end in "01"]  # equal in the eight characters that are shown
    seeded = [fill(store, "cot", 3, model={"name": "tiny", "sha256": sha256}) for sha256 in hashes]
    fill(store, "cot", 4, settings={"loop": {}, "samples": 5, "seed": 1})
    names = [row[0] for row in rows_of(written(store, tmp_path / "out")[1]) if row[0].startswith(("slr (", "cot ("))]
    assert names == [
        *(f"slr (id {run.id})" for run in alike),
        *(f"cot (seed 0, id {run.id})" for run in seeded),
        "cot (seed 1)",
    ]


def test_the_loop_as_configured_is_what_others_are_tested_against(tmp_path):
    store = Store()
    fill(store, "slr", 2, settings={"loop": {"max_iterations": 3}, "samples": 5, "seed": 0})
    fill(store, "slr", 19)
    fill(store, "no_cot", 3)
    rows = {row[0]: row for row in rows_of(written(store, tmp_path / "out")[1])}
    assert rows["slr (max_iterations default)"][3] == "-"
    assert float(rows["slr (max_iterations 3)"][3]) < 0.001
    assert float(rows["no_cot"][3]) < 0.001
    assert rows["2"][2] == "1.000"


def test_sets_of_questions_and_tasks_have_sections_of_their_own(tmp_path):
    store = Store()
    fill(store)
    fill(store, questions_sha256="ef" * 32, source="others")
    fill(store, task="letters")
    text = written(store, tmp_path / "out")[1]
    assert re.findall(r"^## (.*)", text, re.M) == [
        "words: made here",
        "words: others",
        "letters: made here",
        "Manifest",
    ]


def test_controls_are_drawn_as_controls_whatever_they_are_called(tmp_path):
    store = Store()
    for name in ("a", "b"):
        fill(store, "no_cot", 3, model={"name": name})
    assert written(store, tmp_path / "out")[0].count(") (control)<") == 2


def test_a_figure_without_runs_is_shown(tmp_path):
    store = Store()
    asked = {name: spec()[name] for name in ("task", "source", "questions", "questions_sha256")}
    for name in ("one", "two"):
        found = StateAnalysis(1, 0.5, Lens((), {}, ()), Movement((None,), (None,)), None, ())
        store.save_figure("probe", {**asked, "model": {"name": name}}, found.to_json(), {"command": "slr probe"})
    html, text = written(store, tmp_path / "out")
    assert html.count("<svg") == 6
    assert "### Logit lens (model one)" in text
    assert "### Logit lens (model two)" in text
    assert (tmp_path / "out" / "figure_1_4.svg").read_text() == found.plots()["lens"].svg


def test_a_figure_of_another_program_is_refused(tmp_path):
    store = Store()
    asked = {name: spec()[name] for name in ("task", "source", "questions", "questions_sha256")}
    store.save_figure(
        "probe", asked, {"plots": [{"title": "x", "caption": "y", "svg": "<script>alert(1)</script>"}]}, {}
    )
    with pytest.raises(DataError, match="another version"):
        report.write_report(store, tmp_path / "out")


# -- of one piece ----------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing(store, tmp_path):
    page = Page(written(store, tmp_path / "out")[0])
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href", "action"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", (tmp_path / "out" / "report.html").read_text())
    ids = [value for name, value in page.attributes if name == "id"]
    referred = {value[1:] for name, value in page.attributes if name in ("href", "xlink:href")}
    assert referred <= set(ids)


def test_tables_fit_a_phone(store, tmp_path):
    """On a narrow screen every row is a list: each cell names its column, and no cell forbids wrapping."""
    html = written(store, tmp_path / "out")[0]
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) == 3
    for table in tables:
        columns = re.findall(r'<th role="columnheader">(.*?)</th>', table)
        rows = re.findall(r'<tr role="row">(<td.*?)</tr>', table)
        assert rows
        assert all(re.findall(r'data-column="(.*?)"', row) == columns for row in rows)
    style = re.search(r"@media \(max-width.*?\n}", html, re.DOTALL).group()
    assert "table, tbody, tr, td { display: block }" in style
    assert "white-space: normal" in style
    assert "content: attr(data-column)" in style


def test_pictures_of_the_markdown_are_there(store, tmp_path):
    _, text = written(store, tmp_path / "out")
    links = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(links) == len(set(links)) == 4
    for link in links:
        assert (tmp_path / "out" / link).read_text().startswith("<svg")


def test_both_light_and_dark_are_provided_for(store, tmp_path):
    html = written(store, tmp_path / "out")[0]
    assert "color-scheme: light dark" in html
    assert "prefers-color-scheme: dark" in html
    assert plots.GREY not in html
    assert html.count("currentColor") > 10
    assert "currentColor" not in (tmp_path / "out" / "figure_1_1.svg").read_text()


def test_a_report_is_the_same_from_the_file(store, tmp_path):
    assert written(store, tmp_path / "one") == written(Store(store.path), tmp_path / "two")


HOSTILE = '</h2><script>alert("1")</script> | a\n## $x$ $y_{$ [b](http://c) `d` <!-- &amp; \\'


def test_names_are_shown_and_never_run(tmp_path):
    store = Store()
    fields = {"task": HOSTILE, "source": HOSTILE}
    for name in ("slr", "slr_vote"):
        for model in (HOSTILE, "other"):
            fill(store, name, 9, {"command": HOSTILE, HOSTILE: HOSTILE}, model={"name": model}, **fields)
    asked = {**fields, "questions": 20, "questions_sha256": "cd" * 32}
    store.save_figure("baselines", asked, {HOSTILE: 0.5}, {})
    store.save_figure("missing", asked, {HOSTILE: HOSTILE}, {})
    html, text = written(store, tmp_path / "out")
    page = Page(html)
    assert "script" not in page.tags
    assert f"{HOSTILE}: {HOSTILE}" in page.text
    shown = " ".join(HOSTILE.split())
    assert any(shown in cell for row in rows_of(text) for cell in row)
    assert "<script" not in re.sub(r"\\.", "", text)
    assert "](http" not in re.sub(r"\\.", "", text)
    assert sum(line.startswith("## ") for line in text.splitlines()) == 2
    for row in rows_of(text):
        assert len(row) in (6, 10, 11)  # manifest, levels, methods


# -- nothing to report -----------------------------------------------------------------------------------


def test_without_a_finished_run_there_is_nothing_to_report(tmp_path):
    store = Store()
    with pytest.raises(DataError, match="nothing to report"):
        report.write_report(store, tmp_path / "out")
    store.add(store.open(spec()), outcome())
    store.save_figure("missing", spec(), {"cot": "why"}, {})
    with pytest.raises(DataError, match="nothing to report"):
        report.write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["questions", "task", "settings", "model", "questions_sha256"])
def test_results_of_another_program_are_refused(tmp_path, field):
    path = tmp_path / "results.jsonl"
    fill(Store(path), about={"command": "x"})
    lines = path.read_text().splitlines()
    head = json.loads(lines[0])
    del head["spec"][field]
    path.write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="another version"):
        report.write_report(Store(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "entry", "name", "value"),
    [
        (1, "spec", "model", "prosqa"),
        (1, "spec", "model", None),
        (1, "spec", "settings", []),
        (1, "spec", "questions", "many"),
        (64, "data", "luck_rule", "high"),
        (65, "data", "cot", 1),
        (66, "spec", "model", None),
        (66, "data", "by_depth", 5),
        (66, "data", "noise", {"0.1": [1, 2]}),
    ],
)
def test_a_line_of_other_types_is_named(store, tmp_path, line, entry, name, value):
    lines = store.path.read_text().splitlines()
    record = json.loads(lines[line - 1])
    record[entry][name] = value
    lines[line - 1] = json.dumps(record)
    store.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=rf"results\.jsonl, line {line}: not of this program.*{name}.*") as caught:
        report.write_report(Store(store.path), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_figure_of_unknown_kind_is_named(store, tmp_path):
    store.save_figure("picture", {}, {}, {})
    with pytest.raises(DataError, match=r"line 67: .*expected baselines, missing, stability, probe, got \"picture\""):
        report.write_report(Store(store.path), tmp_path / "out")


def test_templates_go_with_the_package():
    folder = Path(report.__file__).with_name("templates")
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md"}
    project = (Path(report.__file__).parents[2] / "pyproject.toml").read_text()
    assert "evaluation/templates" in project


# -- written whole or not at all -------------------------------------------------------------------------


def test_where_no_file_can_be_written_there_is_no_part_of_a_report(store, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/out", Path("/proc/report"), tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written"):
            report.write_report(store, out)
    for name in ("report.html", "report.md", "figure_1_4.svg"):
        out = tmp_path / name
        (out / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=f"{name}: expected a file or nothing, got a folder"):
            report.write_report(store, out)
        assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize("name", ["report.html", "report.md", "figure_1_2.svg"])
def test_the_results_file_is_not_replaced(store, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    results = store.path.rename(out / name)
    before = results.read_bytes()
    (tmp_path / "link").symlink_to(results)
    for path in (results, tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"{name}: expected another folder for the report, this is the results"):
            report.write_report(Store(path, read_only=True), out)
    assert list(out.iterdir()) == [results]
    assert results.read_bytes() == before


def test_a_full_disk_leaves_no_part_of_a_report(store, tmp_path, monkeypatch):
    def full(path, text, **options):
        if "figure_1_2" in path.name:
            raise OSError("No space left")
        return write_text(path, text, **options)

    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"figure_1_2\.svg: the file cannot be written"):
        report.write_report(store, tmp_path / "new/out")
    assert not (tmp_path / "new").exists()
