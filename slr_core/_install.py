"""How to install an extra. The package is not published: this is the one place to change when it is."""

from __future__ import annotations

from pathlib import Path

from slr_core.errors import ConfigError

_SOURCE = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """The shell command that installs ``extra``, an optional dependency group of ``pyproject.toml``.

    It names the clone that this package runs from. A package that was built from a clone does not know its source: the
    command then has to be run inside one.
    """
    if (_SOURCE / "pyproject.toml").is_file():
        return f"pip install -e '{_SOURCE}[{extra}]'"
    return f"pip install -e '.[{extra}]' (in a clone of the repository)"


def missing_extra(feature: str, extra: str, missing: object) -> ConfigError:
    """The error for a feature whose packages are not installed.

    Args:
        feature: what was asked for, a noun phrase in the singular.
        extra: the optional dependency group that provides the packages.
        missing: the names of the missing packages, or the import error.
    """
    return ConfigError(f"{feature} needs the extra `{extra}` ({missing}): {install_command(extra)}")


def exact_install_command(package: str, version: str) -> str:
    """The command that installs this version of a package."""
    return f"pip install {package}=={version}"
