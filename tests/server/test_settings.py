import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from slr_server.settings import ServerSettings, settings_table

ROOT = Path(__file__).parents[2]


def test_every_setting_is_described():
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_environment(monkeypatch):
    monkeypatch.setenv("SLR_PORT", "8123")
    monkeypatch.setenv("SLR_MAX_QUEUE", "3")
    settings = ServerSettings()
    assert (settings.port, settings.max_queue) == (8123, 3)


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
        {"prot": 1},
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


def test_the_name_of_this_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ServerSettings(model=".").model_name == tmp_path.name


def test_the_documented_table_is_current():
    text = (ROOT / "docs" / "server.md").read_text()
    written = re.search(r"<!-- settings: .*? -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert written is not None
    assert written[1] == settings_table(), "put the output of `python -m slr_server.settings` there"


def test_every_complaint_has_its_test():
    text = (ROOT / "docs" / "server.md").read_text()
    named = re.findall(r"`(server/[\w/]*test_\w+\.py)::(test_\w+)`", text)
    assert len(named) == 10
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
