"""Reading single files of a checkpoint, with one clear error for each way in which one can be wrong."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slr_core.checkpoint.folder import BASE, LOOPS, MODEL_FILES
from slr_core.errors import CheckpointError

DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 2**24
MAX_OTHER_BYTES = 2**28
"""Bytes of a file without tensors, such as a vocabulary."""
MAX_HEADER_BYTES = 2**25
MAX_TENSORS = 2**17
"""Tensors of a file. Python objects are made for each of them."""


def file_size(path: Path) -> int:
    """Size in bytes of a regular file, or of one that a link leads to; opening a pipe or a device might never end.

    Raises:
        OSError: there is no such file.
        CheckpointError: it is something else.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise checkpoint_error(path, "not a regular file")
    return found.st_size


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read, or is no such file.
    """
    try:
        file_size(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise checkpoint_error(path, f"not readable ({line(error)})") from error


def checkpoint_sha256(folder: Path) -> str:
    """SHA-256 of the config, tokenizer and weights of a checkpoint folder, in hexadecimal digits.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    # Other files are not the model's: manifests and steps of a training, results that were saved beside it.
    for file in sorted([*folder.glob("*"), *folder.glob(f"{BASE}/*"), *folder.glob(f"{LOOPS}/*/*")]):
        if file.suffix == ".safetensors" or file.name in MODEL_FILES:
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def check_files(folder: Path) -> None:
    """Check the files directly in a folder, before libraries open them: regular ones, of a size that can be read.

    Raises:
        CheckpointError: one is not.
    """
    try:
        for path in sorted(folder.iterdir()):
            if path.is_dir() or not path.exists():  # a broken link is no file
                continue
            if file_size(path) > MAX_OTHER_BYTES and path.suffix in (".json", ".txt", ".model", ".jinja", ".md"):
                raise checkpoint_error(path, f"it has more than {MAX_OTHER_BYTES} bytes")
    except OSError as error:
        raise checkpoint_error(folder, f"not readable ({line(error)})") from error


def read_files(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Files directly in a folder whose names match one of the patterns, by name.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        try:
            file_size(path)
            found[path.name] = path.read_bytes()
        except OSError as error:
            raise checkpoint_error(path, f"not readable ({line(error)})") from error
    return found


def read_json(path: Path) -> Any:
    """Parsed JSON; NaN and infinities are refused.

    Raises:
        CheckpointError: the file cannot be read, is too large, or is not JSON.
    """
    try:
        if file_size(path) > MAX_JSON_BYTES:
            raise checkpoint_error(path, f"it has more than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except (OSError, ValueError, RecursionError) as error:
        raise checkpoint_error(path, f"not readable as JSON ({line(error)})") from error


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or has too many tensors.
    """
    _check_header(path)
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises most kinds, each of them a fault of the file
        raise checkpoint_error(path, f"not a readable safetensors file ({short(error)})") from error


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor as a safetensors header gives them."""

    shape: list[int]
    dtype: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, from its header alone.

    Raises:
        CheckpointError: the file cannot be read, or has too many tensors.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: StoredTensor(list(x.get_shape()), str(x.get_dtype())) for key, x in slices.items()}
    except Exception as error:  # as above
        raise checkpoint_error(path, f"not a readable safetensors file ({short(error)})") from error


def _check_header(path: Path) -> None:
    """Bound the number of tensors without parsing: each one's description has a brace of its own."""
    try:
        size = file_size(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length <= min(size - 8, MAX_HEADER_BYTES) and file.read(length).count(b"{") <= MAX_TENSORS:
                return
    except OSError as error:
        raise checkpoint_error(path, f"not a readable safetensors file ({line(error)})") from error
    if length > size - 8:
        raise checkpoint_error(path, "not a readable safetensors file (its header is longer than the file)")
    raise checkpoint_error(path, f"its header has more than {MAX_TENSORS} tensors or {MAX_HEADER_BYTES} bytes")


class ShardIndex(NamedTuple):
    """What an index of weights says.

    Attributes:
        shards: the files, and the names of the tensors in each.
        metadata: its field of that name, of any type.
    """

    shards: dict[Path, set[str]]
    metadata: Any

    def read(self, read_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of all shards, each of which ``read_file`` reads.

        Raises:
            CheckpointError: a shard cannot be read, or holds other tensors than the index says.
        """
        tensors: dict[str, Tensor] = {}
        for shard, listed in self.shards.items():
            found = read_file(shard)
            if found.keys() != listed:
                raise checkpoint_error(shard, f"the shard and its index disagree about {min(found.keys() ^ listed)}")
            tensors |= found
        return tensors


def read_index(path: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> ShardIndex:
    """Read an index of weights.

    Args:
        path: the index.
        suffixes: of the shards' names.

    Raises:
        CheckpointError: it is no such index, or a shard is not a file beside it.
    """
    data = read_json(path)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise checkpoint_error(path, "not an index of shards: it has no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise checkpoint_error(path, f"it has more than {MAX_TENSORS} tensors")
    shards: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffixes):
            wanted = " or ".join(suffixes)
            raise checkpoint_error(path, f"a shard must be beside its index and end in {wanted}, got {name}")
        shards.setdefault(path.parent / name, set()).add(key)
    for shard in shards:
        if not shard.is_file():
            raise checkpoint_error(path.parent, f"the shard {shard.name} is missing")
    return ShardIndex(shards, data.get("metadata"))


def read_base_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a base model: ``model.safetensors``, or else the shards of ``model.safetensors.index.json``.

    Raises:
        CheckpointError: a file is missing or damaged, or a shard and the index disagree.
    """
    single = folder / "model.safetensors"
    if single.exists() or not (folder / WEIGHTS_INDEX).exists():
        return read_tensors(single)
    return read_index(folder / WEIGHTS_INDEX).read(read_tensors)


def read_headers(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """What several safetensors files hold together.

    Raises:
        CheckpointError: a file cannot be read, or there are too many tensors.
    """
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        stored |= read_header(path)
        if len(stored) > MAX_TENSORS:
            raise checkpoint_error(path, f"there are more than {MAX_TENSORS} tensors up to this file")
    return stored


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Faster than ``isfinite``, which allocates tensors of the same size."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bound.isfinite() for bound in tensor.detach().aminmax())


def check_tensors(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check names, shapes, dtypes and values of tensors read from ``path``.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, of another dtype, or not finite.
    """
    for what, keys in {"missing": expected.keys() - found.keys(), "unknown": found.keys() - expected.keys()}.items():
        if keys:
            raise checkpoint_error(path, f"{len(keys)} tensors are {what}, such as {min(keys)}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise checkpoint_error(path, f"{key} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
        if tensor.dtype not in DTYPES:
            raise checkpoint_error(path, f"{key} has dtype {tensor.dtype}, expected one of {sorted(map(str, DTYPES))}")
        if not is_finite(tensor):
            raise checkpoint_error(path, f"{key} holds values that are not finite")


def cast(path: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor read from ``path`` in another dtype.

    Raises:
        CheckpointError: a value is too large for it.
    """
    converted = tensor.to(dtype, copy=True)
    if not is_finite(converted):
        largest = tensor.abs().max().item()
        raise checkpoint_error(path, f"{key} holds values too large for the base model's {dtype}, up to {largest:.3g}")
    return converted


def checkpoint_error(where: str | Path, what: object) -> CheckpointError:
    """The error of a file or folder: its path and what is wrong, on one line."""
    return CheckpointError(f"{where}: {line(what)}")


def short(error: Exception) -> str:
    """Class and first line of an exception."""
    return line(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])


def line(text: object) -> str:
    """One printable line of bounded length: names and values from a damaged file can be anything."""
    whole = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:10_000]).split())
    return whole if len(whole) <= 400 else whole[:399] + "…"
