"""Write a folder or file whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slr_core.errors import ConfigError


def check_new(out: Path) -> None:
    """Check that a folder can be written.

    Raises:
        ConfigError: it exists and is not empty, or is a link or the working directory, which cannot be replaced; or
            no folder can have this name.
    """
    try:
        out.lstat()
        is_taken = out.is_symlink() or not out.is_dir() or any(out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{out}: the folder cannot be written ({error})") from error
    if is_taken:
        raise ConfigError(f"{out}: expected a new or empty folder")
    if out.samefile(Path()):
        raise ConfigError(f"{out}: expected a new or empty folder that is not the working directory")


def check_outside(out: Path, folder: Path) -> None:
    """Check that a folder to write is not inside a checkpoint that is read, of which it would become a part.

    Raises:
        ConfigError: it is.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out}: expected a folder outside of {folder}, which is read")


def is_write_error(error: Exception) -> bool:
    """Whether an error says that a file cannot be written: of Python, of safetensors, or of tokenizers."""
    # tokenizers has no class of its own.
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception


@contextmanager
def written_whole(out: Path, *, folder: bool = True) -> Iterator[Path]:
    """A temporary path beside ``out`` that becomes ``out`` at the end. After an error nothing is left of it.

    Args:
        out: what to write.
        folder: whether it is a folder, which then exists inside the block, or a file.

    Raises:
        ConfigError: a folder or file cannot be written.
    """
    missing = [path for path in (out.absolute(), *out.absolute().parents) if not os.path.exists(path)]
    part = out.absolute().with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            part.mkdir()
            part.chmod(0o755)  # a server that runs as another user must read it
        yield part
        os.replace(part, out)
    except Exception as error:
        if not is_write_error(error):
            raise
        kind = "folder" if folder else "file"
        raise ConfigError(f"{out}: the {kind} cannot be written ({error})") from error
    finally:
        if os.path.isdir(part):  # not Path.is_dir, which raises if the name is too long
            shutil.rmtree(part)
        elif os.path.exists(part):
            part.unlink()
        if not os.path.exists(out):
            for path in missing[1:]:
                if os.path.exists(path):
                    path.rmdir()
