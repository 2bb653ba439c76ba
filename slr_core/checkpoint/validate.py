"""Reading single files of a checkpoint, with one clear error for each way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slr_core.errors import CheckpointError

DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> Any:
    """Parsed JSON; NaN and infinities are refused.

    Raises:
        CheckpointError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except (OSError, ValueError, RecursionError) as error:
        raise checkpoint_error(path, f"not readable as JSON ({line(error)})") from error


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises most kinds, each of them a fault of the file
        raise checkpoint_error(path, f"not a readable safetensors file ({short(error)})") from error


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor as a safetensors header gives them."""

    shape: list[int]
    dtype: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: StoredTensor(list(x.get_shape()), str(x.get_dtype())) for key, x in slices.items()}
    except Exception as error:  # as above
        raise checkpoint_error(path, f"not a readable safetensors file ({short(error)})") from error


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
        if not tensor.isfinite().all():
            raise checkpoint_error(path, f"{key} holds values that are not finite")


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
