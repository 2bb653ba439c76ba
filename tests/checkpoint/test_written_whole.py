"""Folders and files that are written whole, or not at all."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from slr_core.checkpoint.written_whole import check_new, written_whole
from slr_core.errors import ConfigError


@pytest.mark.parametrize("folder", [True, False])
def test_what_was_written_is_there(folder, tmp_path):
    out = tmp_path / "new/deep/out"
    with written_whole(out, folder=folder) as part:
        (part / "file" if folder else part).write_text("x")
        assert not out.exists()
    assert (out / "file" if folder else out).read_text() == "x"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("folder", [True, False])
def test_nothing_is_left_after_an_error(folder, tmp_path):
    def fail(part):
        (part / "file" if folder else part).write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "new/out", folder=folder) as part:
        fail(part)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_config_error(tmp_path):
    """Python, safetensors and tokenizers each have an error of their own."""
    for error in (OSError("No space left"), SafetensorError("No space left"), Exception("No space left")):
        with (
            pytest.raises(ConfigError, match=r"out: the folder cannot be written \(No space left\)"),
            written_whole(tmp_path / "out"),
        ):
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_folder_can_have_is_a_config_error(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "out", tmp_path / "file/out"):
        with pytest.raises(ConfigError, match="the folder cannot be written"):
            check_new(out)
        with pytest.raises(ConfigError, match="the folder cannot be written"), written_whole(out):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_with_content_is_kept(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        check_new(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"), written_whole(tmp_path):
        pass
    assert (tmp_path / "kept").read_text() == "x"


def test_a_link_and_the_working_directory_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        check_new(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="not the working directory"):
        check_new(Path())


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_or_an_empty_folder_may_be_written(exists, tmp_path):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    check_new(out)
