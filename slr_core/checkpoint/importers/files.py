"""Find and read the weights of a published checkpoint: safetensors or a pickle, in one file or in shards.

This is the only place of the project that reads pickles. They are read with ``weights_only``, which builds tensors and
plain containers and calls nothing else.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slr_core.checkpoint.folder import missing_folder
from slr_core.checkpoint.validate import DTYPES, checkpoint_error, line, read_index, read_tensors, short

MAX_PICKLE_BYTES = 64 * 2**30
"""Largest pickle file that is read."""
MAX_PICKLE_PROGRAM_BYTES = 64 * 2**20
"""Largest program inside a pickle: what builds the containers, without the values of the tensors."""
SINGLE = ("model.safetensors", "pytorch_model.bin", "model.pt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FROM_HUB = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.txt", "*.model", "*checkpoint*", "*.jinja", "README.md"]
"""Files of a hub repository that an import may need."""
BASE_FROM_HUB = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Files of a base model that every import needs: its configuration and its tokenizer."""


class Weights:
    """The tensors of a checkpoint by name. A conversion takes or drops every one of them.

    Attributes:
        where: the file or folder, for messages.
        dropped: what was dropped, and why.
    """

    def __init__(self, where: Path, tensors: dict[str, Tensor]) -> None:
        self.where, self._tensors = where, tensors
        self.dropped: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def has_prefix(self, prefix: str) -> bool:
        """Whether a name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self._tensors)

    def take(self, name: str) -> Tensor:
        """Remove a tensor and return it.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self._tensors:
            raise checkpoint_error(self.where, f"it has no tensor {name}")
        return self._tensors.pop(name)

    def take_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Remove all tensors whose names begin with ``prefix``; their names are returned without it."""
        names = [name for name in self._tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._tensors.pop(name) for name in names}

    def drop(self, pattern: str, what: str, why: str) -> None:
        """Drop all tensors whose whole name matches the regular expression ``pattern``; the model card says so."""
        names = [name for name in self._tensors if re.fullmatch(pattern, name)]
        for name in names:
            del self._tensors[name]
        if names:
            self.dropped[f"{what} ({len(names)} tensor{'s' * (len(names) > 1)})"] = why

    def check_empty(self, hint: str = "") -> None:
        """Refuse tensors that were neither taken nor dropped.

        Raises:
            CheckpointError: there are some; ``hint`` is added to the message.
        """
        if self._tensors:
            count, first = len(self._tensors), min(self._tensors)
            raise checkpoint_error(self.where, f"{count} tensors have no place in this form, such as {first}{hint}")


def local_source(path_or_id: str, revision: str | None, allow: list[str]) -> Path:
    """The local path of a file, a folder or a hub id, which is downloaded first.

    Args:
        path_or_id: what the user names.
        revision: branch, tag or commit of a hub id; ``None``: the main branch.
        allow: patterns of the files to download.

    Raises:
        CheckpointError: there is no such file or folder, or the hub id cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    path = Path(path_or_id)
    if path.exists():
        if revision is not None:
            raise checkpoint_error(path_or_id, "a revision needs a hub id, and this is a local path")
        return path
    if fault := missing_folder(path_or_id):
        raise checkpoint_error(path_or_id, fault)
    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=allow))
    except Exception as error:  # of the hub's client and of the network, which have no common class
        raise checkpoint_error(
            path_or_id, f"neither a local path nor a hub id that can be downloaded ({line(error)})"
        ) from error


def read_weights(path: Path, names: tuple[str, ...] = SINGLE) -> Weights:
    """Read all tensors of a checkpoint: of a file, or of a folder that holds one file or shards with an index.

    Args:
        path: the file or folder.
        names: file names of unsharded weights that are looked for in a folder, in this order.

    Raises:
        CheckpointError: no weights are found, a shard is missing, a file cannot be read or holds anything but tensors,
            or a tensor is not finite.
    """
    if path.is_dir():
        index = next((path / name for name in INDEXES if (path / name).is_file()), None)
        tensors = _read_shards(index) if index is not None else _read_whole(_only_file(path, names))
    elif path.is_file():
        tensors = _read_whole(path)
    else:
        raise checkpoint_error(path, "no such file or folder")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise checkpoint_error(path, f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        if not tensor.isfinite().all():
            raise checkpoint_error(path, f"{name} holds values that are not finite")
    return Weights(path, tensors)


def _only_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.glob("checkpoint*") if file.is_file())
    if not found:
        raise checkpoint_error(folder, f"it has no weights: none of {', '.join([*INDEXES, *names])} or checkpoint_N")
    if len(found) > 1:
        listed = ", ".join(file.name for file in found)
        raise checkpoint_error(folder, f"it has several checkpoints, name one of them: {listed}")
    return found[0]


def _read_shards(path: Path) -> dict[str, Tensor]:
    index = read_index(path, (".safetensors", ".bin"))
    tensors = index.read(_read_file)
    return tensors | _aliases(tensors, index.metadata)


def _read_whole(path: Path) -> dict[str, Tensor]:
    tensors = _read_file(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors |= _aliases(tensors, file.metadata())
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not zipfile.is_zipfile(path):
        raise checkpoint_error(path, "neither a safetensors file nor one that torch.save wrote (since torch 1.6)")
    return _read_pickle(path)


def _aliases(tensors: Mapping[str, Tensor], metadata: Any) -> dict[str, Tensor]:
    """Tied tensors that were stored once: ``metadata`` then maps the name that was left out to the one that is there.

    ``huggingface_hub.save_torch_state_dict`` writes it so.
    """
    if not isinstance(metadata, dict):
        return {}
    return {
        name: tensors[stored]
        for name, stored in metadata.items()
        if isinstance(stored, str) and stored in tensors and name not in tensors
    }


def _read_pickle(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:
        raise checkpoint_error(path, f"a pickle of more than {MAX_PICKLE_BYTES} bytes is not read")
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise checkpoint_error(path, f"not a readable file of torch.save ({short(error)})") from error
    for entry in entries:
        # A compressed entry may be far larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED:
            raise checkpoint_error(path, f"its entry {entry.filename} is compressed; torch.save compresses nothing")
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_PROGRAM_BYTES:
            raise checkpoint_error(path, f"its entry {entry.filename} has more than {MAX_PICKLE_PROGRAM_BYTES} bytes")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises most kinds; a refused global names what the file wanted to call
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = f"it wants to call {found[1]}" if found else short(error)
        raise checkpoint_error(path, f"not a plain state dict; only tensors are read ({what})") from error
    if not isinstance(loaded, dict):
        raise checkpoint_error(path, f"expected a state dict, got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise checkpoint_error(path, f"expected a state dict of tensors, {name} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise checkpoint_error(path, f"{name} claims more values than the file holds")
    return dict(loaded)


def licence_of(path: Path) -> str | None:
    """The licence that a folder's README.md states in its front matter; ``None``: none is stated."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S.*)$", front[1], re.MULTILINE) if front else None
    return line(found[1]).strip("'\"") if found else None
