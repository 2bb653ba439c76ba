"""The files of a checkpoint folder, and how a checkpoint is found: as a folder, a bundled one or a hub id."""

from __future__ import annotations

from pathlib import Path

CONFIG, MODULES, LOOPS, BASE = "slr_config.json", "slr_modules.safetensors", "loops", "base"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
DEFAULT_CHECKPOINT = BUNDLED_FOLDER / "prosqa"
READ_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def bundled_names() -> list[str]:
    """Names of the checkpoints inside the package."""
    return sorted(folder.name for folder in BUNDLED_FOLDER.iterdir())


def local_path(path_or_id: str | Path | None) -> Path:
    """The local path of a checkpoint. ``None`` is the bundled ``prosqa``; a folder comes before a bundled name."""
    path = DEFAULT_CHECKPOINT if path_or_id is None else Path(path_or_id)
    bundled = {folder.name: folder for folder in BUNDLED_FOLDER.iterdir()}.get(str(path))
    return path if bundled is None or path.is_dir() else bundled


def is_missing_folder(path_or_id: str | Path) -> bool:
    """Whether a name can only mean a local folder, and there is none: it must not be looked up on the hub.

    A hub id is ``name`` or ``owner/name``. A name with one slash means a folder if the part before the slash is one.
    """
    path = Path(path_or_id)
    looks_local = path.is_absolute() or str(path_or_id).startswith((".", "~")) or len(path.parts) > 2
    in_folder = len(path.parts) == 2 and path.parent.is_dir()
    return (looks_local or in_folder) and not path.exists()


def local_folder(path_or_id: str | Path | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded first.

    Raises:
        CheckpointError: it is neither a folder nor a hub id that can be downloaded.
    """
    # Imported here, so that a command that needs only the names above starts without torch.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from slr_core.checkpoint.validate import checkpoint_error, line

    folder = local_path(path_or_id)
    if path_or_id is not None and is_missing_folder(path_or_id):
        raise checkpoint_error(str(path_or_id), "no such folder")
    try:
        return folder if folder.is_dir() else Path(snapshot_download(str(path_or_id), allow_patterns=READ_FROM_HUB))
    except (HFValidationError, OSError, ValueError) as error:
        raise checkpoint_error(
            str(path_or_id), f"neither a folder nor a hub id that can be downloaded ({line(error)})"
        ) from error
