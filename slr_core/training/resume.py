"""Where a run of ``slr train`` starts, and what it leaves in ``output_dir/steps`` so that it can be continued."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from slr_core.checkpoint.folder import local_path
from slr_core.checkpoint.validate import checkpoint_sha256
from slr_core.checkpoint.written_whole import is_write_error
from slr_core.errors import CheckpointError, ConfigError, TrainingError
from slr_core.model.base_support import describe_tokenizer
from slr_core.reasoner import LatentReasoner
from slr_core.training.config import TrainConfig
from slr_core.training.data import StageStream
from slr_core.training.sources import open_source
from slr_core.validation import differences, shortened, validated

RUN = "run.json"
"""File in ``steps`` that says what a run was started with."""

GUARD = "guard.json"
"""File in a checkpoint with the state of the :class:`~slr_core.training.guard.TrainingGuard`."""

_NEEDED = (OPTIMIZER_NAME, SCHEDULER_NAME, GUARD, "rng_state*.pth")
_MAY_CHANGE = {"output_dir", "threads", "save_steps", "log_steps"}
"""Settings that have no effect on the weights, apart from rounding, which depends on `threads`."""
_AGAIN = "{} with what it was started with, or delete {} to train anew"


def find_start(output: Path, config: TrainConfig, *, resume: bool) -> Path | None:
    """The checkpoint from which a run goes on; ``None``: it starts at step 0.

    Raises:
        ConfigError: there is nothing to resume, the run was started with another recipe, or the folder holds something
            that a run from step 0 would replace.
    """
    steps = output / "steps"
    checkpoints = [folder for folder in _checkpoints(steps) if _is_whole(folder)]
    if resume:
        if not steps.is_dir():
            raise ConfigError(f"--resume: no run was started in {output}")
        if checkpoints or (steps / RUN).exists():
            check_recipe(steps, config)
        if (last := last_complete(steps)) is not None:
            return last
        if checkpoints:
            raise ConfigError(
                f"--resume: no checkpoint in {steps} is complete: {checkpoints[0].name} lacks "
                f"{_missing(checkpoints[0])[0]}; delete {steps} to start again"
            )
    elif checkpoints:
        raise ConfigError(f"{output} already holds a run: continue it with --resume, or choose another output_dir")
    if output.is_dir() and (others := sorted(path.name for path in output.iterdir() if path != steps)):
        raise ConfigError(f"output_dir: {output} is not empty, it holds {others[0]}: choose a new or empty folder")
    return None


def last_complete(steps: Path) -> Path | None:
    """The newest checkpoint in a folder that was saved to its end and lacks no file."""
    return next((folder for folder in _checkpoints(steps) if _is_whole(folder) and not _missing(folder)), None)


def holds_run(steps: Path) -> bool:
    """Whether a checkpoint in a folder was saved to its end: there is a run to resume."""
    return any(map(_is_whole, _checkpoints(steps)))


def _checkpoints(steps: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    numbers = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in steps.glob("checkpoint-*")}
    found = {folder: int(number[1]) for folder, number in numbers.items() if number}
    return sorted(found, key=lambda folder: found[folder], reverse=True)


def _is_whole(folder: Path) -> bool:
    # The Trainer writes its state last.
    try:
        return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"], int)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _missing(folder: Path) -> list[str]:
    return [name for name in _NEEDED if not any(folder.glob(name))]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once: whoever finds it finds a whole one.

    Raises:
        OSError: the folder cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def describe_inputs(
    config: TrainConfig, stream: StageStream, reasoner: LatentReasoner, teacher: LatentReasoner | None
) -> dict[str, Any]:
    """What is behind the names in a recipe: hashes of its questions, and what its models must not change."""
    read = [
        (data.file or data.text or data.split, source.sha256)
        for stage, sources in zip(config.schedule, stream.sources, strict=True)
        for data, source in zip(stage.data, sources, strict=True)
    ]
    inputs = {
        "questions": {name: digest for name, digest in read if name is not None},
        "model": _describe(reasoner),
    }
    if teacher is not None:
        inputs["teacher"] = {**_describe(teacher), "weights": _digest(teacher)}
    # Last: what differs in the settings says more than a hash.
    return {**inputs, "loaded": _hash_models(config)}


def _hash_models(config: TrainConfig) -> dict[str, str]:
    """Hashes of the local folders from which the models of a recipe are loaded, by the setting that names them."""
    named = {"base.from": config.base.source, "teacher": config.teacher}
    folders = {name: local_path(place) for name, place in named.items() if place is not None}
    return {name: checkpoint_sha256(folder) for name, folder in folders.items() if folder.is_dir()}


def _hash_questions(config: TrainConfig) -> dict[str, str | None]:
    """Hashes of the question and text files of a recipe, of those that exist."""
    used = {data.file or data.text or "": data for stage in config.schedule for data in stage.data}
    return {
        name: open_source(data, config.seed, config.held_out).sha256
        for name, data in used.items()
        if Path(name).is_file()
    }


def _describe(model: LatentReasoner) -> dict[str, Any]:
    base = model.base.config.to_dict()
    tokenizer = json.dumps(describe_tokenizer(model.tokenizer), sort_keys=True)
    return {
        "base": {key: base[key] for key in base if key not in ("_name_or_path", "transformers_version")},
        **model.config.model_dump(mode="json", include={"loop", "text"}),
        "tokenizer": sha256(tokenizer.encode("utf-8", "surrogatepass")).hexdigest(),
    }


def _digest(model: LatentReasoner) -> str:
    weights = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        weights.update(name.encode() + raw.numpy().tobytes())
    return weights.hexdigest()


@contextmanager
def claim(steps: Path) -> Iterator[None]:
    """Create the folder of a run's checkpoints, and keep other processes from training in it.

    The lock ends with the process, however that ends.

    Raises:
        ConfigError: another process trains in it, or it cannot be written.
    """
    try:
        steps.mkdir(parents=True, exist_ok=True)
        lock = (steps / ".lock").open("w")
    except OSError as error:
        raise _not_written(steps, error) from error
    with lock:
        try:
            # This lock belongs to the process: loader processes do not inherit it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(f"output_dir: another process is training in {steps.parent}") from error
            # Some network file systems have no locks: then nobody is kept out.
        yield


def write_run(steps: Path, config: TrainConfig, inputs: Mapping[str, Any]) -> None:
    """Write what a run is started with, for :func:`check_run`.

    Args:
        steps: the folder of the checkpoints.
        config: the recipe.
        inputs: from :func:`describe_inputs`.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        write_json(steps / RUN, {"recipe": _settings(config), **inputs})
    except OSError as error:
        raise _not_written(steps, error) from error


def _not_written(steps: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output_dir: {steps.parent} cannot be written ({error.strerror})")


def check_recipe(steps: Path, config: TrainConfig) -> None:
    """Check that a run is resumed with the recipe that it was started with.

    Raises:
        ConfigError: as :func:`check_run`.
    """
    check_run(steps, {"recipe": _settings(config)})


def check_run(steps: Path, now: Mapping[str, Any]) -> None:
    """Check that a run is resumed with what it was started with.

    With anything else the weights would come from neither, and the model card would state the last for the whole run.

    Args:
        steps: the folder of the checkpoints.
        now: entries of the file :data:`RUN`, as they would be written now.

    Raises:
        ConfigError: the file cannot be read, or an entry that has an effect on the weights is another.
    """
    try:
        before = json.loads((steps / RUN).read_text(encoding="utf-8"))
        then = {name: before[name] for name in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{steps.parent} cannot be resumed: {steps / RUN}, which says what it began with, cannot be read: {error}"
        ) from error
    # As JSON: its keys are strings.
    _check_same(
        then,
        json.loads(json.dumps(now)),
        f"{steps.parent} cannot be resumed: ",
        _AGAIN.format("resume it", steps.parent),
    )


def is_finished(manifest: Path, config: TrainConfig) -> bool:
    """Whether a run has all steps of its recipe, by the manifest in its folder.

    Raises:
        ConfigError: it has, with another recipe.
    """
    try:
        finished = json.loads(manifest.read_text(encoding="utf-8"))["steps"] == config.total_steps
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if finished:
        check_trained(manifest, config)
    return bool(finished)


def check_trained(manifest: Path, config: TrainConfig) -> None:
    """Check that a finished model was trained with a recipe, from the manifest beside it.

    If the folder ``steps`` of the run is there too, its files of questions, its base and its teacher must be those that
    it began with; those that no longer exist are not compared.

    Raises:
        ConfigError: the manifest cannot be read, or a setting, a file or a model that has an effect on the weights is
            another.
        DataError: a file of questions cannot be read.
    """
    folder = manifest.parent
    try:
        recipe = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]
        # A manifest leaves out what is None, and does not know settings that came after it: both get their defaults.
        trained = validated(TrainConfig, {**recipe, "output_dir": config.output_dir})
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{manifest}: not the manifest of a training ({error}); delete {folder}") from error
    what, advice = f"{folder} is trained already: ", _AGAIN.format("use it", folder)
    _check_same({"recipe": _settings(trained)}, {"recipe": _settings(config)}, what, advice)
    try:
        began = json.loads((folder / "steps" / RUN).read_text(encoding="utf-8"))
        then = {entry: dict(began[entry]) for entry in ("questions", "loaded")}
    except (OSError, ValueError, KeyError, TypeError):
        return  # the model was copied without it, or is older than these entries
    now: dict[str, Any] = {"questions": _hash_questions(config), "loaded": _hash_models(config)}
    _check_same({entry: {name: then[entry].get(name) for name in now[entry]} for entry in now}, now, what, advice)


def _settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True, exclude=_MAY_CHANGE)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], what: str, advice: str) -> None:
    for name, old, new in differences(dict(before), dict(now)):
        changed = f"{name.removeprefix('recipe.')} was {shortened(old)} when it was started and is {shortened(new)} now"
        raise ConfigError(f"{what}{changed}: {advice}")


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """Name the checkpoint whose optimizer or random state cannot be read.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        yield
    except (PermissionError, torch.OutOfMemoryError):
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, UnpicklingError) as error:
        about = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CheckpointError(
            f"{checkpoint}: not a complete checkpoint ({about}): delete this folder to resume from the one before it"
        ) from error


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Name the folder that cannot be written.

    Raises:
        TrainingError: it cannot, for want of room as a rule.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not (is_write_error(error) or isinstance(error, RuntimeError)):
            raise
        raise TrainingError(f"{folder}: cannot be written ({error}); --resume continues once it can") from error
