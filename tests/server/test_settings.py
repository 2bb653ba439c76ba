import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from slr_server.cli import read_settings
from slr_server.settings import ServerSettings, settings_table

ROOT = Path(__file__).parents[2]


def test_every_setting_is_described():
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_environment(monkeypatch):
    monkeypatch.setenv("SLR_PORT", "8123")
    monkeypatch.setenv("SLR_MAX_QUEUE", "3")
    settings = ServerSettings()
    assert (settings.port, settings.max_queue) == (8123, 3)


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""

    def write(text):
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_config_file(config, monkeypatch):
    path = config("port: 1\nslots: 2\nmax_queue: 3\nthreads: null\nstatic_shapes: false\n")
    monkeypatch.setenv("SLR_SLOTS", "4")
    monkeypatch.setenv("SLR_HOST", "::1")
    settings = ServerSettings(config=path, port=5)
    assert (settings.port, settings.slots, settings.max_queue, settings.host) == (5, 4, 3, "::1")
    assert (settings.threads, settings.static_shapes) == (None, False)
    monkeypatch.setenv("SLR_CONFIG", path)
    assert ServerSettings().max_queue == 3
    assert ServerSettings(config=config("")).max_queue == 256


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 1", "server.yaml: unknown setting prot; did you mean port?"),
        ("max-queue: 1", "server.yaml: unknown setting max-queue; did you mean max_queue?"),
        ("config: other.yaml", "server.yaml: unknown setting config"),
        ("1: 2", "server.yaml: unknown setting 1"),
        ("- port", "server.yaml must hold settings"),
        ("port: [", "cannot read .*server.yaml"),
    ],
)
def test_wrong_config_files(config, text, told):
    with pytest.raises(SettingsError, match=f"config: .*{told}"):
        ServerSettings(config=config(text))


def test_wrong_values_in_config_files(config):
    with pytest.raises(ValidationError, match="port") as error:
        ServerSettings(config=config("port: 70000\nadmin_key: short-secret"))
    assert "short-secret" not in str(error.value)


def test_missing_config_file(tmp_path):
    with pytest.raises(SettingsError, match=r"cannot read .*nowhere.yaml"):
        ServerSettings(config=str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"max_queue": 0},
        {"slots": 0},
        {"threads": 0},
        {"max_state_values": -1},
        {"request_timeout_s": 0},
        {"request_timeout_s": float("inf")},
        {"log_level": "loud"},
        {"dtype": "int8"},
        {"served_model_name": ""},
        {"prot": 1},
        {"ssl_keyfile": "key.pem"},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValidationError):
        ServerSettings(**wrong)


@pytest.mark.parametrize(
    ("model", "name"), [(None, "prosqa"), ("/some/where/tiny", "tiny"), ("tiny/", "tiny"), ("someone/tiny", "tiny")]
)
def test_model_name(model, name):
    assert ServerSettings(model=model).model_name == name


def test_served_model_name():
    assert ServerSettings(model="some/tiny", served_model_name="org/other").model_name == "org/other"


def test_model_name_of_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ServerSettings(model=".").model_name == tmp_path.name


def test_documented_table():
    text = (ROOT / "docs" / "server.md").read_text()
    written = re.search(r"<!-- settings: .*? -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert written is not None
    assert written[1] == settings_table(), "replace it by the output of `python -m slr_server.settings`"


def test_documented_tests_exist():
    text = (ROOT / "docs" / "server.md").read_text()
    named = re.findall(r"`(server/[\w/]*test_\w+\.py)::(test_\w+)`", text)
    assert len(named) == 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


def test_config_file_without_end(tmp_path):
    path = tmp_path / "slr.yaml"
    path.write_bytes(b"slots: 2\n" + b"#" * (1 << 20))
    for file in (str(path), "/dev/zero"):
        with pytest.raises(SettingsError, match="has more than 1048576 bytes"):
            read_settings(["--config", file])
