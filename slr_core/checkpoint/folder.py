"""Names inside a checkpoint folder, and where a checkpoint is: a folder, a bundled one or a hub id."""

from __future__ import annotations

from pathlib import Path

CONFIG, MODULES, LOOPS, BASE = "slr_config.json", "slr_modules.safetensors", "loops", "base"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
DEFAULT_CHECKPOINT = BUNDLED_FOLDER / "prosqa"
READ_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def bundled_names() -> list[str]:
    """Names of the checkpoints that ship inside the package."""
    return sorted(folder.name for folder in BUNDLED_FOLDER.iterdir())


def local_path(path_or_id: str | Path | None) -> Path:
    """Where a checkpoint is, if here: ``None`` is ``prosqa``; those that ship have names, unless a folder has them."""
    path = DEFAULT_CHECKPOINT if path_or_id is None else Path(path_or_id)
    shipped = {folder.name: folder for folder in BUNDLED_FOLDER.iterdir()}.get(str(path))
    return path if shipped is None or path.is_dir() else shipped


def local_folder(path_or_id: str | Path | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded first.

    Raises:
        CheckpointError: it is neither a folder nor a hub id that can be fetched.
    """
    # Here, so that a command that only needs the names above starts without torch.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from slr_core.checkpoint.validate import checkpoint_error, line

    folder = local_path(path_or_id)
    try:
        return folder if folder.is_dir() else Path(snapshot_download(str(path_or_id), allow_patterns=READ_FROM_HUB))
    except (HFValidationError, OSError, ValueError) as error:
        raise checkpoint_error(
            str(path_or_id), f"neither a folder nor a hub id that can be fetched ({line(error)})"
        ) from error
