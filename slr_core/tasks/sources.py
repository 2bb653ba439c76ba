"""Where the questions of a task come from: a file, the hub, or its generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

from slr_core._install import missing_extra
from slr_core.errors import ConfigError, DataError
from slr_core.tasks.base import Example, OptionValue, Task, read_jsonl


@dataclass(frozen=True)
class Questions:
    """Questions and where they come from.

    Attributes:
        examples: at least one.
        source: for a reader, without paths of this machine.
        sha256: of the examples themselves (their JSON lines, keys sorted), whatever they were read from.
    """

    examples: tuple[Example, ...]
    source: str
    sha256: str


def load_questions(
    task: Task,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    generate: int | None = None,
    seed: int = 0,
    generator_options: Mapping[str, OptionValue] | None = None,
    limit: int | None = None,
) -> Questions:
    """The questions of a task, from exactly one of three sources.

    Args:
        task: whose questions.
        data: a ``.jsonl`` or ``.jsonl.gz`` file.
        split: a name of ``task.hub``, read from the hub (or its cache) through ``datasets``.
        generate: how many to generate.
        seed: of the generated ones.
        generator_options: of the generator, see ``task.generator_options``.
        limit: the first so many only.

    Raises:
        ConfigError: not exactly one source, or one that the task does not have.
        DataError: the file or split cannot be read, holds nothing, or holds a question that the task cannot grade.
    """
    if sum(source is not None for source in (data, split, generate)) != 1:
        raise ConfigError("give exactly one source of questions: a data file, a split, or a number to generate")
    if generator_options and generate is None:
        raise ConfigError(f"generator options ({', '.join(generator_options)}) are for generated questions")
    if (limit is not None and limit < 1) or (generate is not None and generate < 1):
        raise ConfigError(f"limit and the number to generate must be at least 1, got {limit} and {generate}")
    if data is not None:
        examples = read_jsonl(data)
        source = "/".join(Path(data).parts[-2:])
    elif split is not None:
        examples = _from_hub(task, split, limit)
        where = task.hub[split]
        source = f"hub: {where.dataset}{f' ({where.subset})' if where.subset else ''}, {where.split}"
    else:
        examples = list(islice(task.generate(seed, **dict(generator_options or {})), generate))
        settings = dict(task.generator_options) | dict(generator_options or {})
        source = f"generated, seed {seed}, {', '.join(f'{k}={v}' for k, v in settings.items())}"
    chosen = tuple(examples[:limit])
    if not chosen:
        raise DataError(f"{source}: no questions in it")
    if generate is None:
        _check(task, chosen, source)
    return Questions(chosen, source, fingerprint(chosen))


def _check(task: Task, examples: tuple[Example, ...], source: str) -> None:
    for number, example in enumerate(examples, start=1):
        try:
            if not task.prompt(example).strip():
                raise DataError("the question is empty")
            task.check_example(example)
        except DataError as error:
            raise DataError(f"{source}, question {number}, task {task.name}: {error}") from error


def fingerprint(examples: tuple[Example, ...]) -> str:
    """SHA-256 over the examples' JSON lines, keys sorted."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.to_json(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _from_hub(task: Task, split: str, limit: int | None) -> list[Example]:
    if split not in task.hub:
        known = f"it has {', '.join(task.hub)}" if task.hub else "it has none: give a file"
        raise ConfigError(f"the task {task.name} has no split {split} on the hub; {known}")
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise missing_extra("reading a data set from the hub", "eval", error) from error
    where = task.hub[split]
    try:
        rows = datasets.load_dataset(where.dataset, where.subset, split=where.split)
        return [task.from_row(row) for row in islice(rows, limit)]
    except DataError:
        raise
    except Exception as error:  # of the network, of the hub, of the format: datasets has no common class
        raise DataError(f"cannot read {where.dataset}, split {where.split}: {error!r}") from error
