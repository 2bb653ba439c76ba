import signal
import socket
import sys

import pytest

from slr_server import cli
from slr_server.settings import ServerSettings


@pytest.fixture(autouse=True)
def _untouched_signals():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slr-serve", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_help_names_every_setting(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for name in ServerSettings.model_fields:
        assert f"--{name.replace('_', '-')} " in shown


def test_flags_come_before_the_environment(monkeypatch):
    served = []
    monkeypatch.setattr(cli, "serve", served.append)
    monkeypatch.setattr(sys, "argv", ["slr-serve", "--port", "1", "--slots", "2"])
    monkeypatch.setenv("SLR_PORT", "3")
    monkeypatch.setenv("SLR_HOST", "::1")
    cli.main()
    assert (served[0].port, served[0].slots, served[0].host) == (1, 2, "::1")


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--port", "70000"], ["--nope"], ["--log-level", "loud"]])
def test_wrong_flags(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 2
    assert "slr-serve: error: " in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(monkeypatch, "--port", port, "--log-level", "error") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slr-serve: error: cannot listen on 127.0.0.1:{port}")


def test_a_checkpoint_that_is_none(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--port", "0", "--model", str(tmp_path), "--log-level", "error") == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"slr-serve: error: {tmp_path}: not a latent-reasoning checkpoint")
    assert "ready" not in captured.out
