"""The files of a checkpoint folder, the bundled checkpoints, and names that can only mean a local folder."""

from __future__ import annotations

from pathlib import Path

from slr_core.suggest import nearest

CONFIG, MODULES, LOOPS, BASE = "slr_config.json", "slr_modules.safetensors", "loops", "base"
BASE_CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUNDLED_FOLDER = Path(__file__).parent / "bundled"
DEFAULT_CHECKPOINT = BUNDLED_FOLDER / "prosqa"
MODEL_FILES = frozenset(
    (
        *(
            CONFIG,
            BASE_CONFIG,
            ADAPTER_CONFIG,
            "generation_config.json",
            "model.safetensors.index.json",
            "examples.json",
        ),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    )
)
"""Files beside the weights that belong to a model, here or in its folders ``base`` and ``loops``."""
READ_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
_RESEMBLES = 0.8
"""Similarity (0 to 1) from which a name that could be a hub id counts as a mistyped folder."""


def bundled_names() -> list[str]:
    """Names of the checkpoints inside the package."""
    return sorted(folder.name for folder in BUNDLED_FOLDER.iterdir() if (folder / CONFIG).is_file())


def local_path(path_or_id: str | Path | None) -> Path:
    """The local path of a checkpoint. ``None`` is the bundled ``prosqa``; a folder comes before a bundled name."""
    path = DEFAULT_CHECKPOINT if path_or_id is None else Path(path_or_id)
    return BUNDLED_FOLDER / path if str(path) in bundled_names() and not path.is_dir() else path


def missing_folder(path_or_id: str | Path) -> str | None:
    """What is wrong with a name that means a local folder which does not exist; ``None``: nothing.

    Such a name must not be looked up on the hub, where an id is ``name`` or ``owner/name``. A name with one slash means
    a folder if the part before the slash is one. Any name means a folder if it resembles one that exists, or a bundled
    checkpoint, unless the hub's cache holds a model of that name.
    """
    name, path = str(path_or_id), Path(path_or_id)
    if local_path(path_or_id).exists():
        return None
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(path.parts) > 2
    if looks_local or (len(path.parts) == 2 and path.parent.is_dir()):
        beside = nearest(path.name, [folder.name for folder in _folders(path.parent)])
        return "no such file or folder" + (f"; did you mean {path.parent / beside}?" if beside else "")
    near = [str(inner) for folder in _folders(path.parent.parent) for inner in _folders(folder)]
    if len(path.parts) < 2:
        near = [*map(str, _folders(Path())), *bundled_names()]
    found = nearest(name, near, cutoff=_RESEMBLES)
    if found is None or _is_cached(name):
        return None
    return f"no such file or folder; did you mean {found}? (if it is a hub id: `hf download {name}` first)"


def _folders(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _is_cached(repo_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in (CONFIG, BASE_CONFIG))
    except HFValidationError:
        return False
