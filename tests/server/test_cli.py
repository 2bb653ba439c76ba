import signal
import socket
import subprocess
import sys

import pytest

from slr_core._version import __version__
from slr_core.engine import Engine
from slr_core.errors import CheckpointError
from slr_server import cli
from slr_server.settings import ServerSettings
from tests import tiny


@pytest.fixture(autouse=True)
def no_threads_of_other_tests(monkeypatch):
    """While a daemon thread of an earlier test runs, the command would end this process."""
    monkeypatch.setattr(cli, "unfinished", lambda: False)


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


def test_flags_before_environment(monkeypatch):
    served = []
    monkeypatch.setattr(cli, "serve", served.append)
    monkeypatch.setattr(sys, "argv", ["slr-serve", "--port", "1", "--slots", "2"])
    monkeypatch.setenv("SLR_PORT", "3")
    monkeypatch.setenv("SLR_HOST", "::1")
    cli.main()
    assert (served[0].port, served[0].slots, served[0].host) == (1, 2, "::1")


def test_config_file(monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("port: 1\nslots: 2\nmax_queue: 3\n")
    monkeypatch.setenv("SLR_SLOTS", "4")
    settings = cli.read_settings(["--config", str(tmp_path / "c.yaml"), "--port", "5"])
    assert (settings.port, settings.slots, settings.max_queue) == (5, 4, 3)


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"slr-serve {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prot", "1"], "unknown argument --prot; did you mean --port?"),
        (["--max_queue=1"], "unknown argument --max_queue=1; did you mean --max-queue?"),
        (["--mod", "x"], "unknown argument --mod; did you mean --model?"),
        (["serve"], "unknown argument serve"),
        (["--port"], "argument --port: expected one argument"),
        (["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, told):
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slr-serve: error: {told}")


def test_device_and_dtype(monkeypatch):
    loaded = {}

    def load(model, **options):
        loaded.update(options)
        raise CheckpointError("not now")

    monkeypatch.setattr(Engine, "from_pretrained", load)
    settings = cli.read_settings(["--port", "0", "--device", "cuda:1", "--dtype", "bfloat16", "--log-level", "error"])
    with pytest.raises(SystemExit):
        cli.serve(settings)
    assert (loaded["device"], loaded["dtype"]) == ("cuda:1", "bfloat16")


@pytest.mark.parametrize(("flag", "value"), [("--device", "tpu"), ("--device", "cuda:99")])
def test_unavailable_device(monkeypatch, capsys, flag, value):
    assert run(monkeypatch, "--port", "0", flag, value, "--log-level", "error") == 1
    assert "slr-serve: error: device" in capsys.readouterr().err


def test_plain_model(monkeypatch, capsys, tmp_path):
    tiny.base().save_pretrained(tmp_path / "base")
    assert run(monkeypatch, "--port", "0", "--model", str(tmp_path / "base"), "--log-level", "error") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a plain transformers model" in line
    assert f"`slr init {tmp_path / 'base'} --out DIR`" in line


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--port", "70000"], ["--nope"], ["--log-level", "loud"]])
def test_wrong_flags(monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments) == 2
    assert "slr-serve: error: " in capsys.readouterr().err.splitlines()[-1]


def test_port_in_use(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(monkeypatch, "--port", port, "--log-level", "error") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"slr-serve: error: cannot listen on 127.0.0.1:{port}")


@pytest.mark.slow
def test_two_servers_on_a_port(guarded):
    port = guarded.url.rpartition(":")[2]
    command = [sys.executable, "-m", "slr_server.cli", "--port", port, "--log-level", "error"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"slr-serve: error: cannot listen on 127.0.0.1:{port}")


def test_missing_loop_sets(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--port", "0", "--loop-sets", str(tmp_path / "none")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"slr-serve: error: loop_sets: there is no folder {tmp_path / 'none'}"


def test_not_a_checkpoint(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--port", "0", "--model", str(tmp_path), "--log-level", "error") == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"slr-serve: error: {tmp_path}: not a latent-reasoning checkpoint")
    assert "ready" not in captured.out
