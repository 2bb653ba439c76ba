import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from slr_core import __version__, cli
from slr_core.cli.evaluate import MethodName
from slr_core.cli.options import show_results
from slr_core.config import Criterion
from slr_core.errors import DataError
from slr_core.evaluation.methods import METHODS
from slr_core.tasks import TASKS
from tests.cli.questions import QUESTION

GROUP = typer.main.get_command(cli.app)

WRONG = {
    "no-such-model": ["generate", "--model", "/no/where", "x"],
    "empty-prompt": ["generate", "--model", "FOLDER", " "],
    "bounds": ["generate", "--model", "FOLDER", "--min-iterations", "4", "--max-iterations", "2", QUESTION],
    "chat": ["generate", "--model", "FOLDER", "--chat", QUESTION],
    "learned": ["generate", "--model", "FOLDER", "--criterion", "learned", QUESTION],
    "stream": ["generate", "--model", "FOLDER", "--stream", "--json", QUESTION],
    "states": ["trace", "--model", "FOLDER", "--states", "/no/where/h.safetensors", QUESTION],
    "init-base": ["init", "/no/where", "--out", "/no/where/else"],
    "init-file": ["init", "/no/where.gguf", "--out", "/no/where/else"],
    "init-config": ["init", "FOLDER", "--out", "/no/where/else", "--config", "/no/where.yaml"],
    "export-gguf": [
        "export",
        "--model",
        "FOLDER",
        "--to",
        "gguf",
        "--base",
        "/no/where.gguf",
        "--out",
        "/no/where/else",
    ],
    "init-out": ["init", "FOLDER", "--out", "FOLDER"],
}


@pytest.mark.parametrize("case", WRONG)
def test_error_is_one_line(case, run, folder):
    code, out, err = run(*(folder if word == "FOLDER" else word for word in WRONG[case]))
    assert code == 1
    assert err.startswith("slr: ")
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "--max-iterations", "-1", "x"],
        ["generate", "--max-iterations", "many", "x"],
        ["generate", "--criterion", "vibes", "x"],
        ["generate", "--patience", "0", "x"],
        ["generate", "--threshold", "nan", "x"],
        ["generate", "--threshold", "-1", "x"],
        ["generate", "--top-p", "1.5", "x"],
        ["trace", "--top-tokens", "51", "x"],
        ["train", "/no/where.yaml"],
        ["init"],
        ["init", "x"],
        ["init", "x", "--out", "y", "--seed", "-1"],
        ["export", "--to", "gguf"],
        ["export", "--to", "gguf", "--out", "x", "--gguf-type", "Q9"],
        ["export", "--to", "gguf", "--out", "x", "--base-revision", "main"],
        ["export", "--to", "hf", "--out", "x", "--gguf-type", "F16"],
        ["export", "--to", "hf", "--out", "x", "--base", "smollm2"],
        ["nonesuch"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_version(run):
    assert run("--version")[:2] == (0, f"slr {__version__}\n")


LOADING = {
    "generate": ["x"],
    "chat": [],
    "trace": ["x"],
    "info": [],
    "eval": ["--task", "prosqa", "--generate", "1"],
    "compare": ["--task", "prosqa", "--generate", "1"],
    "stability": ["--task", "prosqa", "--generate", "1"],
    "probe": ["--task", "prosqa", "--generate", "1"],
}
"""Commands that load a model, with the arguments that they need."""


@pytest.mark.parametrize("name", LOADING)
def test_device_and_dtype(name, run, folder):
    code, _, err = run(name, "--model", folder, "--device", "cuda:99", "--dtype", "bfloat16", *LOADING[name])
    assert (code, err) == (1, "slr: device cuda:99 is not available here\n")


def test_every_loading_command():
    takes = {
        option: {name for name, command in GROUP.commands.items() if option in flags(command)}
        for option in ("--model", "--device", "--dtype", "--quantization")
    }
    assert takes["--model"] == LOADING.keys() | {"export"}, "an export keeps the weights as they are"
    assert takes["--device"] == LOADING.keys() | {"sweep"}, "a sweep loads what it has trained"
    assert takes["--quantization"] == takes["--device"]
    assert takes["--dtype"] == takes["--device"] | {"import", "init"}, "they write weights in it"


def test_json_means_one_thing():
    """``--json`` is a flag and ``--output`` takes a file in every command; init and import write a folder."""
    options = {
        flag: {
            name: option for name, command in GROUP.commands.items() for option in command.params if flag in option.opts
        }
        for flag in ("--json", "--output")
    }
    assert all(option.is_flag for option in options["--json"].values())
    assert not any(option.is_flag for option in options["--output"].values())
    assert options["--output"].keys() == options["--json"].keys() - {"init", "import"}


def flags(command):
    return {flag for parameter in command.params for flag in parameter.opts}


# -- help and completion -----------------------------------------------------------------------------------


def shown(*arguments):
    result = CliRunner().invoke(cli.app, [*arguments, "--help"], prog_name="slr")
    assert result.exit_code == 0
    return result.output


def letters(text):
    """Without the blanks that wrapping changes."""
    return "".join(text.split())


def test_help_lists_commands():
    output = letters(shown())
    for command in GROUP.commands.values():
        summary = command.help.split("\n\n")[0].removesuffix(".")
        assert letters(summary) in output, f"the help of slr cuts off the summary of {command.name}"


@pytest.mark.parametrize(
    "name", sorted(GROUP.commands.keys() - {"serve"})
)  # its help is the server's: see test_serve.py
def test_help_is_whole(name):
    """Every help text appears in full; brackets must not be taken for markup."""
    command, output = GROUP.commands[name], letters(shown(name))
    assert letters(command.help) in output
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} has no help text"
        assert letters(parameter.help) in output
        assert letters(max(parameter.opts, key=len)) in output


def test_methods_are_listed():
    assert get_args(MethodName) == tuple(METHODS)
    assert letters(", ".join(METHODS)) in letters(shown("compare"))


def test_tasks_are_listed():
    output = letters(shown("eval"))
    assert letters(", ".join(TASKS)) in output
    for task in TASKS.values():
        for names in (task.generator_options, task.hub):
            assert not names or letters(f"{task.name}: {', '.join(names)}") in output


def test_choices_are_listed():
    assert letters("<" + "|".join(get_args(Criterion)) + ">") in letters(shown("generate"))
    error = CliRunner().invoke(cli.app, ["generate", "--criterion", "vibes", "x"]).output
    assert all(f"'{name}'" in error for name in get_args(Criterion))


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(["trace", "--modle", "x", "y"], "--model"), (["trcae", "x"], "'trace'"), (["eval", "--dta", "x"], "--data")],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_suggestion(arguments, suggestion):
    assert suggestion in CliRunner().invoke(cli.app, arguments).output


def completions(line):
    """What bash offers at the end of ``line``."""
    words = line.split(" ")
    environment = {"_SLR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = (
        "import sys; from slr_core.cli import app\n"
        "try: app(prog_name='slr')\n"
        "finally: assert 'torch' not in sys.modules, 'completion must not wait for torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_completion():
    assert completions("slr generate --model pro") == ["prontoqa", "prosqa", "prosqa-large"]
    assert completions("slr generate --criterion en") == ["entropy_change", "end_token"]
    assert completions("slr generate --device c") == ["cpu", "cuda"]
    assert completions("slr eval --task pro") == ["prosqa", "prontoqa"]
    assert completions("slr eval --method slr_") == ["slr_fixed", "slr_vote"]
    assert completions("slr compare --methods slr,no_") == ["slr,no_cot", "slr,no_thought"]
    assert completions("slr eval --task math --split t") == ["train", "test", "test500"]
    assert completions("slr eval --task prontoqa --generator-option ") == ["hops=", "balanced="]
    assert completions("slr tr") == ["trace", "train"]


def test_results_survive_an_unwritable_output(capsys):
    with pytest.raises(DataError, match="cannot write /dev/full: No space left"):
        show_results({"a": 1}, lambda: None, as_json=True, output=Path("/dev/full"))
    assert json.loads(capsys.readouterr().out) == {"a": 1}
