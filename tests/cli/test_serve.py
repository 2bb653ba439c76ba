import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from slr_core._install import install_command
from slr_server import cli as server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def slr_serve(monkeypatch):
    """The function that the installed command calls."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return EntryPoint("slr-serve", scripts["slr-serve"], "console_scripts").load()


@pytest.fixture
def served(monkeypatch):
    """Settings that the server was started with."""
    served = []
    monkeypatch.setattr(server, "serve", served.append)
    monkeypatch.setattr(server.signal, "signal", lambda *_: None)
    return served


def test_flags_reach_the_server(run, served):
    assert run("serve", "--port", "1", "--model", "prontoqa")[0] == 0
    assert [(settings.port, settings.model) for settings in served] == [(1, "prontoqa")]


def test_help_is_the_servers(run, served):
    code, out, _ = run("serve", "--help")
    assert code == 0
    assert re.search("^usage: slr-serve", out)
    assert "--max-queue" in out


def test_wrong_flag(run, served):
    code, _, err = run("serve", "--prot", "1")
    assert code == 2
    assert "slr-serve: error: " in err


def test_slr_serve(slr_serve, served, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slr-serve", "--slots", "2"])
    slr_serve()
    assert served[0].slots == 2


def test_missing_extra(run, slr_serve, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "slr_server.cli", None)
    code, out, err = run("serve")
    assert (code, out) == (1, "")
    assert err.startswith("slr: the server needs the extra `serve`")
    assert err.endswith(f"{install_command('serve')}\n")
    monkeypatch.setattr(sys, "argv", ["slr-serve"])
    with pytest.raises(SystemExit, match="1"):
        slr_serve()
    assert capsys.readouterr().err == err.replace("slr: ", "slr-serve: error: ")
