"""Names of files in a checkpoint, and changes to them."""

from pathlib import Path

from safetensors.torch import load_file, save_file

BASE_WEIGHTS, MODULES = "base/model.safetensors", "slr_modules.safetensors"
ADAPTER = "loops/loop_02/adapter_model.safetensors"
ADAPTER_CONFIG = "loops/loop_02/adapter_config.json"


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    changed = change(dict(tensors))
    save_file({key: x.contiguous() for key, x in (tensors if changed is None else changed).items()}, path)


def first(tensors, value):
    key = min(key for key, x in tensors.items() if x.is_floating_point())
    return {**tensors, key: value(tensors[key])}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
