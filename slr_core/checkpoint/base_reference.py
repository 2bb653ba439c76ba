"""Where the base model of a checkpoint is: inside its folder, or outside as an exact reference.

A reference is a name, a revision and the SHA-256 of the weights (``base``, ``base_revision``, ``base_sha256`` of the
config). The weights are compared with it at every loading.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from slr_core._install import exact_install_command
from slr_core.checkpoint.folder import BASE, BASE_CONFIG, CONFIG, READ_FROM_HUB
from slr_core.checkpoint.pretrained import PACKAGED, dequantized_folder, packaged_file
from slr_core.checkpoint.validate import WEIGHTS_INDEX, checkpoint_error, file_sha256, line, read_index
from slr_core.config import SLRConfig
from slr_core.errors import CheckpointError, ConfigError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseReference:
    """A base model outside of a checkpoint, exactly.

    Attributes:
        name: a hub id, or a key of :data:`~slr_core.checkpoint.pretrained.PACKAGED`.
        revision: the commit, or the version of the package.
        sha256: as in the config.
        folder: where it is now, in transformers' format.
    """

    name: str
    revision: str
    sha256: str
    folder: Path

    @property
    def hub_id(self) -> str | None:
        """The name, if it is a hub id."""
        return None if self.name in PACKAGED else self.name


def base_source(folder: Path, config: SLRConfig) -> tuple[str, bool]:
    """Where the base model of a checkpoint is, and whether that is a folder inside the checkpoint.

    A reference is downloaded or dequantized first, and compared.

    Raises:
        CheckpointError: the name cannot be used, or the base of a reference is not installed, cannot be downloaded or
            has other weights.
    """
    where = folder / CONFIG
    try:
        local = (folder / config.base).resolve()
        inside = folder.resolve() in local.parents and local.is_dir()
        # A relative name that exists beside the process would be taken for the hub id.
        named = Path(config.base)
        elsewhere = named.is_absolute() or ".." in named.parts or named.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise checkpoint_error(where, f"base is not a usable name ({line(error)})") from error
    if config.base_sha256 is not None:
        if inside:
            raise checkpoint_error(
                where, f"base_sha256 is for a base outside of the checkpoint, and {config.base}/ is inside"
            )
        return str(_compared(where, config)), False
    if config.base == BASE and not inside:
        raise checkpoint_error(folder, f"the base model's folder {BASE}/ is missing, or a link out of the checkpoint")
    if not inside and elsewhere:
        raise checkpoint_error(where, f"base must be a folder inside the checkpoint or a hub id, got {config.base}")
    return str(local) if inside else config.base, inside


def find_reference(name: str, revision: str | None = None) -> BaseReference:
    """Find, or download, a base model by its name.

    Args:
        name: a key of :data:`~slr_core.checkpoint.pretrained.PACKAGED`, whose installed version is taken, or a hub id.
        revision: branch, tag or commit of a hub id; ``None``: the main branch.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: the hub id cannot be downloaded or has no safetensors, or the cache folder cannot be written.
    """
    if name in PACKAGED:
        file = packaged_file(name)
        sha256 = file_sha256(file)
        return BaseReference(name, _installed_version(name), sha256, dequantized_folder(file, sha256))
    folder = _download(name, revision)
    return BaseReference(name, folder.name, _weights_sha256(folder), folder)


def _compared(where: Path, config: SLRConfig) -> Path:
    """The folder of a reference whose weights are those of the config."""
    name, revision = config.base, str(config.base_revision)
    if name in PACKAGED:
        try:
            file = packaged_file(name)
        except ConfigError as error:
            raise checkpoint_error(where, f"base: {error}") from error
        package, sha256 = PACKAGED[name].distribution, file_sha256(file)
        held = f"{package} {_installed_version(name)}"
        _compare(where, config, sha256, f"{name} ({held})", exact_install_command(package, revision))
        return dequantized_folder(file, sha256)
    if not _COMMIT.fullmatch(revision):
        raise checkpoint_error(
            where, f"base_revision must be the commit of the hub id {name}, 40 hexadecimal digits, got {revision}"
        )
    try:
        folder = _download(name, revision)
        found = _weights_sha256(folder)
    except CheckpointError as error:
        raise checkpoint_error(where, f"base: {error}") from error
    again = f"if a file is damaged: `hf download {name} --revision {revision} --force-download`"
    _compare(where, config, found, f"{name} at {revision}", again)
    return folder


def _compare(where: Path, config: SLRConfig, found: str, held: str, remedy: str) -> None:
    if found != config.base_sha256:
        raise checkpoint_error(
            where, f"base_sha256 is {config.base_sha256}, and the weights of {held} have {found}; {remedy}"
        )


def _installed_version(name: str) -> str:
    try:
        return version(PACKAGED[name].distribution)
    except PackageNotFoundError:
        return "unknown"  # the module is there without its metadata


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a base model on the hub. The hub is not asked for a commit that the cache holds."""
    try:
        if revision is not None and _COMMIT.fullmatch(revision):
            cached = try_to_load_from_cache(name, BASE_CONFIG, revision=revision)
            if isinstance(cached, str) and _weight_files(Path(cached).parent):
                return Path(cached).parent
        # Without the folders of a repository: these hold the same weights in other formats.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=READ_FROM_HUB, ignore_patterns=["*/*"]))
        if not _weight_files(folder):
            raise FileNotFoundError("its safetensors are missing or incomplete")
        return folder
    except Exception as error:  # of the hub's client and of the network, which have no common class
        exact = "" if revision is None else f" --revision {revision}"
        raise checkpoint_error(
            name, f"cannot be downloaded ({line(error)}); with a connection: `hf download {name}{exact}`"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from, in the order of their names; none if one is missing."""
    single, index = folder / "model.safetensors", folder / WEIGHTS_INDEX
    if single.exists():
        return [single]
    if not index.exists():
        return []
    try:
        return sorted(read_index(index).shards)
    except CheckpointError:  # the download of a shard has not ended
        return []


def _weights_sha256(folder: Path) -> str:
    files = _weight_files(folder)
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(f"{file_sha256(file)}  {file.name}\n" for file in files).encode()).hexdigest()
