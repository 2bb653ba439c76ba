"""The documents: paths, links, commands and flags exist, and what the README shows happens."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer

from slr_core import tasks
from slr_core.cli import app
from slr_core.config import Criterion
from slr_core.evaluation.methods import METHODS
from slr_core.evaluation.sweep import SweepConfig, SweepEvaluation, expand_variants
from slr_server.protocol.native import TraceRequest
from slr_server.settings import ServerSettings
from tests import tiny
from tests.server.process import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page for pattern in ("*.md", "docs/*.md", "configs/*.md", "slr_core/**/README.md") for page in ROOT.glob(pattern)
)
FOLDERS = ("slr_core", "server", "tests", "docs", "configs", "benchmarks", "deploy", "docker")
PATH = re.compile(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?:::(\w+))?")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
CLI = typer.main.get_command(app)


def page(path):
    return pytest.param(path, id=str(path.relative_to(ROOT)))


PAGE = pytest.mark.parametrize("path", [page(path) for path in PAGES])


# -- what they name exists -----------------------------------------------------------------------------------


def missing(path, text):
    """Paths and links that lead nowhere, and tests that no file has."""
    for name, test in PATH.findall(text):
        file = next((folder / name for folder in (ROOT, ROOT / "tests") if (folder / name).exists()), None)
        if file is None and "NAME" not in name:
            yield name
        elif file is not None and test and f"def {test}(" not in file.read_text():
            yield f"{name}::{test}"
    yield from (link for link in LINK.findall(text) if not (path.parent / link).exists())


@PAGE
def test_paths_exist(path):
    assert list(missing(path, path.read_text())) == []


def test_finds_missing_paths():
    there = "`docs/method.md`, `configs/NAME.yaml`, `tests/test_docs.py::test_paths_exist`, [a](docs/glossary.md#terms)"
    assert list(missing(ROOT / "README.md", there)) == []
    gone = "`slr_core/gone.py`, `tests/test_docs.py::test_gone`, [b](gone.md), [c](https://x.org/gone)"
    assert list(missing(ROOT / "README.md", gone)) == ["slr_core/gone.py", "tests/test_docs.py::test_gone", "gone.md"]


def blocks(text):
    """Code blocks, fenced or indented by four, without their indentation."""
    fenced = r"^```\w*\n(.*?)^```$"
    yield from re.findall(fenced, text, re.MULTILINE | re.DOTALL)
    for block in re.findall(
        r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.sub(fenced, "", text, flags=re.M | re.S), re.MULTILINE
    ):
        yield re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


def commands(text):
    """Lines of code blocks and inline code that run ``slr`` or ``slr-serve``."""
    lines = [line for block in blocks(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        for part in re.split(r"\s(?:&&|\|)\s|\s#\s", line):
            if re.match(r"\s*slr(-serve)?(\s|$)", part):
                yield part.strip()


def unknown(command):
    """Subcommand and flags of a command line that do not exist."""
    program, *words = command.split()
    name = words[0] if program == "slr" and words and not words[0].startswith("-") else None
    if name is not None and name not in CLI.commands:
        return [name]
    if name == "serve" or program == "slr-serve":
        known = {f"--{field.replace('_', '-')}" for field in ServerSettings.model_fields} | {"--help", "--version"}
    else:
        parameters = (CLI.commands[name] if name else CLI).params
        known = {flag for p in parameters for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    return sorted(set(FLAG.findall(command)) - known)


@PAGE
def test_commands_exist(path):
    assert {command: unknown(command) for command in commands(path.read_text()) if unknown(command)} == {}


def test_finds_unknown_commands():
    block = "    slr gone && slr eval \\\n      --nothing 1   # slr init --x\n    slr-serve --port 1 --no\n"
    assert [(c.split()[:2], unknown(c)) for c in commands(f"`slr info --gone` and\n\n{block}")] == [
        (["slr", "gone"], ["gone"]),
        (["slr", "eval"], ["--nothing"]),
        (["slr", "init"], ["--x"]),
        (["slr-serve", "--port"], ["--no"]),
        (["slr", "info"], ["--gone"]),
    ]


@PAGE
def test_make_targets_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = path.read_text()
    code = [*(line for block in blocks(text) for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", text)]
    used = {name for line in code for name in re.findall(r"(?:^|\s)make ([a-z-]+)", line)}
    assert used <= set(targets)


def test_criteria_listed():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    assert set(get_args(Criterion)) <= set(table)


def test_fields_listed():
    """The table of the README names every field of the bodies of ``/generate`` and ``/trace``."""
    rows = re.findall(r"^\| `POST /(?:generate|trace)` \|.*$", README, re.MULTILINE)
    assert set(TraceRequest.model_fields) <= set(re.findall(r"`(\w+)`", "".join(rows)))


def evaluation_rows():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE)
    return [(re.findall(r"\w+", names), [cell.strip() for cell in cells.split("|")]) for names, cells in rows]


def test_tasks_listed():
    table = {names[0]: cells for names, cells in evaluation_rows()}
    for name in tasks.task_names():
        task = tasks.get_task(name)
        assert table[name][1].replace("`", "") == ", ".join(
            f"{option}={str(value).lower()}" for option, value in task.generator_options.items()
        )
        assert table[name][2].replace("`", "") == ", ".join(task.hub)


def test_methods_listed():
    table = {names[0]: cells[0] for names, cells in evaluation_rows()}
    assert {name: table.get(name) for name in METHODS} == {name: method.help for name, method in METHODS.items()}


def test_fields_of_a_sweep_listed():
    listed = {name for names, _ in evaluation_rows() for name in names}
    assert SweepConfig.model_fields.keys() | SweepEvaluation.model_fields.keys() <= listed


def test_sweep_of_the_manual(tmp_path):
    text = (ROOT / "docs/evaluation.md").read_text()
    (block,) = [block for block in blocks(text) if block.lstrip().startswith("recipe:")]
    (tmp_path / "sweep.yaml").write_text(block)
    shutil.copy(ROOT / "configs/findings/small.yaml", tmp_path / "base.yaml")
    models = list(expand_variants(SweepConfig.from_yaml(tmp_path / "sweep.yaml"), tmp_path))
    assert len(models) == 2 * 2 * 3


def test_panels_exist():
    """Panels stand in italics; a title that goes on after a comma may be cut there."""
    dashboards = [json.loads(file.read_text()) for file in (ROOT / "deploy/grafana/dashboards").glob("*.json")]
    titles = {panel["title"].split(",")[0] for dashboard in dashboards for panel in dashboard["panels"]}
    manual = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", re.sub(r"\s+", " ", manual)))
    assert len(named) > 10
    assert named - titles == {"Accuracy against mean iterations"}  # a plot of the report


def test_guarantees_name_their_tests():
    """Each promise of SECURITY.md names a test. Of a bare file name, :func:`test_paths_exist` knows nothing."""
    text = (ROOT / "SECURITY.md").read_text()
    promises = re.split(r"^- ", text[text.index("## Guarantees") : text.index("## Not covered")], flags=re.MULTILINE)[
        1:
    ]
    assert [promise for promise in promises if not re.search(r"`[\w/]*test[\w/.:]*`", promise)] == []
    for name, test in re.findall(r"`(?!tests/)((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", text):
        assert f"def {test or 'test_'}" in (ROOT / "tests/server" / name).read_text(), f"{name}::{test}"


def test_measured_claims():
    """No part is said to make the loop stable, which no ablation found, and `prontoqa` has its committed figures."""
    assert "keep the loop stable" not in README
    measured = (ROOT / "benchmarks/results/prontoqa.txt").read_text()
    asked = r"--generator-option hops=(\d)( --generator-option balanced=true)?\n.*?^all +1000 +([01]\.\d+)"
    found = {(int(m[1]), bool(m[2])): float(m[3]) for m in re.finditer(asked, measured, re.MULTILINE | re.DOTALL)}
    balanced, official = ([found[hops, form] for hops in range(3, 8)] for form in (True, False))
    text = " ".join(README.split())
    assert f"scores {min(balanced):.3f} to {max(balanced):.3f} on balanced questions of 3 to 7 hops" in text
    assert f"{min(official):.3f} to {max(official):.3f} on those of the official form" in text


def test_pictures_have_commands():
    """Those of runs; the others are drawings."""
    manual = (ROOT / "docs/operations.md").read_text()
    for picture in re.findall(r"\]\((\S+\.svg)\)", manual):
        assert ("slr report results.jsonl" if picture == "frontier.svg" else "python docs/panels.py") in manual


# -- what the README shows happens ---------------------------------------------------------------------------


SNIPPETS = list(blocks(README))
PYTHON = "from ", "import "


def starting(*words, snippets=SNIPPETS):
    return [block for block in snippets if block.startswith(words)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server("prosqa", tmp_path_factory.mktemp("server") / "log")
    yield started
    started.kill()


def at(server, snippet):
    return re.sub(r"(http://)?(127\.0\.0\.1|localhost):8000", server.url, snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(snippet, marks=pytest.mark.slow) if ":8000" in snippet else snippet  # it starts a server
        for snippet in (
            *starting(*PYTHON),
            *starting(*PYTHON, snippets=list(blocks((ROOT / "docs/engine.md").read_text()))),
        )
    ],
    ids=lambda snippet: snippet.split("\n")[0],
)
def test_python(snippet, request, capsys):
    """A snippet runs; where it has a comment ``# prints``, it prints the comments that follow."""
    if ":8000" in snippet:
        snippet = at(request.getfixturevalue("server"), snippet)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
    _, _, shown = snippet.partition("# prints:\n")
    assert shown == "" or capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)$", shown, re.MULTILINE)


def test_has_python():
    assert len(starting(*PYTHON)) >= 2


@pytest.mark.slow
def test_curl(server):
    """The answer is the one shown, apart from what varies: its id, its times, and the last digits of numbers."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (command,), (shown,) = starting("curl "), starting('{"id"')
    done = subprocess.run(["bash", "-c", at(server, command)], capture_output=True, text=True, timeout=60, check=True)
    answer, shown = json.loads(done.stdout), json.loads(shown)
    for body in (answer, shown):
        assert body.pop("id").startswith("slr-")
        assert body.pop("created") > 0
        (result,) = body["results"]
        body["times"] = sorted(result.pop("timings"))
        body["change"] = (
            pytest.approx(result.pop("final_change"), rel=1e-3) if body is shown else result.pop("final_change")
        )
    assert answer == shown


def test_trace(run):
    """``slr trace`` prints the table shown, of the question shown."""
    (command,), (shown,) = starting("curl "), starting("t  rel. change")
    question = json.loads(re.search(r"-d '(.*)'", command, re.DOTALL)[1])["prompt"]
    code, out, _ = run("trace", question)
    assert code == 0
    numbers = r"-?\d+(?:\.\d+)?(?! ms)"
    for line, printed in zip(shown.splitlines(), out.splitlines(), strict=True):
        line, printed = re.sub(r", [\d.]+ m?s\]", "]", line), re.sub(r", [\d.]+ m?s\]", "]", printed)
        # The page leaves the last columns out.
        words, more = re.sub(numbers, "", line).split(), re.sub(numbers, "", printed).split()
        assert more[: len(words)] == words
        values, others = (list(map(float, re.findall(numbers, text))) for text in (line, printed))
        assert others[: len(values)] == pytest.approx(values, abs=0.011)


@pytest.mark.slow
def test_shell(tmp_path):
    """The commands that make a checkpoint, where ``path/to/base`` is a base model."""
    (snippet,) = starting("echo ")
    base = tmp_path / "path" / "to" / "base"
    tiny.base().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    script = snippet.replace("slr ", shlex.join([sys.executable, "-m", "slr_core.cli"]) + " ")
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    config = json.loads((tmp_path / "my-reasoner" / "slr_config.json").read_text())
    assert config["loop"]["workspace"] == "block"
