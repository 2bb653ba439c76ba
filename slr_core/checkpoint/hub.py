"""Models on the hub: their small files are looked up before any weights are downloaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import (
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

from slr_core.checkpoint.folder import BASE_CONFIG, CONFIG, READ_FROM_HUB, local_path, missing_folder
from slr_core.checkpoint.validate import checkpoint_error, line

_TIMEOUT_S = 10.0


def read_hub_file(repo_id: str, name: str) -> Path | None:
    """A small file of a model on the hub, from the cache or downloaded; ``None`` if the model has no such file.

    The hub is asked once, without retries: a mistyped name is reported at once.

    Raises:
        CheckpointError: there is no such model, it needs access rights, or the hub cannot be reached.
    """
    try:
        cached = try_to_load_from_cache(repo_id, name)
        if isinstance(cached, str):
            return Path(cached)
        get_hf_file_metadata(hf_hub_url(repo_id, name), timeout=_TIMEOUT_S)
        return Path(hf_hub_download(repo_id, name))
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise checkpoint_error(repo_id, "no such folder, and not a hub id") from error
    except GatedRepoError as error:
        raise checkpoint_error(
            repo_id, "the hub grants access to this model on request only: request it, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise checkpoint_error(repo_id, "no such folder, and no such model on the hub") from error
    except Exception as error:  # of the network: the hub's client has no common class
        if any(isinstance(try_to_load_from_cache(repo_id, other), str) for other in (CONFIG, BASE_CONFIG)):
            return None  # a cached model was complete when it was downloaded
        raise checkpoint_error(
            repo_id, f"no such folder, and not a model on the hub that can be reached ({line(error)})"
        ) from error


def find_file(path_or_id: str, name: str) -> Path | None:
    """A small file of a local folder, a bundled checkpoint or a model on the hub; ``None`` if it has no such file.

    Raises:
        CheckpointError: there is no such folder and no such model.
    """
    local = local_path(path_or_id)
    try:
        if local.is_dir():
            return local / name if (local / name).is_file() else None
        fault = "not a folder" if local.exists() else missing_folder(path_or_id)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise checkpoint_error(path_or_id, f"not a usable name ({line(error)})") from error
    if fault is not None:
        raise checkpoint_error(path_or_id, fault)
    return read_hub_file(path_or_id, name)


def checkpoint_folder(path_or_id: str | Path | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded first, if it names a checkpoint.

    Raises:
        CheckpointError: there is no such folder and no such model, or it is not a latent reasoner.
    """
    local = local_path(path_or_id)
    name = str(local if path_or_id is None else path_or_id)
    if find_file(name, CONFIG) is None:
        if find_file(name, BASE_CONFIG) is not None:
            raise checkpoint_error(
                name, f"a plain transformers model: `slr init {name} --out DIR` makes a latent reasoner of it"
            )
        raise checkpoint_error(name, f"not a latent-reasoning checkpoint, it has no {CONFIG}")
    if local.is_dir():
        return local
    try:
        return Path(snapshot_download(name, allow_patterns=READ_FROM_HUB))
    except (OSError, ValueError) as error:
        raise checkpoint_error(name, f"cannot be downloaded ({line(error)})") from error
