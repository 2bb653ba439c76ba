"""Sources of examples: a generator, a task's file or split, or plain text."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

from slr_core import tasks
from slr_core.errors import DataError
from slr_core.tasks.base import Example, OptionValue, Task
from slr_core.tasks.prosqa import GraphSpec, generate_graph, to_example
from slr_core.tasks.sources import Questions, load_questions
from slr_core.training.stages import DataConfig

CONTINUES = "continues"
"""Extra field of a piece of plain text: no end token follows it."""

_WINDOW = 32  # number of batches whose questions are sorted by length together, to need little padding
_DRAWN = 4  # the same for generated questions, of which all batches but one are dropped


class Source(ABC):
    """A source of examples.

    Attributes:
        description: where the examples come from, for the manifest.
        sha256: of the file; ``None`` for generated examples.
    """

    description: str
    sha256: str | None = None

    @abstractmethod
    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """The examples of a step; they depend on the arguments only."""


class Graphs(Source):
    """ProsQA graphs, drawn from the step's random generator."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec, self.description = spec, f"prosqa, generated: {spec}"

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """New graphs."""
        for _ in range(count):
            yield to_example(generate_graph(self.spec, rng), rng)


class Generated(Source):
    """Prompts of another task's generator; a batch holds questions of like length."""

    def __init__(self, task: Task, generator_options: dict[str, OptionValue]) -> None:
        self.task, self.generator_options = task, generator_options
        self.description = f"{task.name}, generated: {task.generator_settings(generator_options)}"

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """New questions, from a seed drawn for the step: a quarter of those generated, sorted by length.

        Which quarter is drawn, too: over many steps, every length is as frequent as the generator makes it.
        """
        examples = islice(self.task.generate(rng.getrandbits(63), **self.generator_options), _DRAWN * count)
        by_length = sorted(_prompts(self.task, examples), key=lambda example: len(example.question))
        start = rng.randrange(_DRAWN) * count
        return iter(by_length[start : start + count])


def _prompts(task: Task, examples: Iterable[Example]) -> list[Example]:
    """The examples, each with what the task puts to a model as its question."""
    return [replace(example, question=task.prompt(example)) for example in examples]


class Listed(Source):
    """A finite list, shuffled anew in every epoch; a batch holds questions of like length."""

    sha256: str

    def __init__(self, examples: Sequence[Example], seed: int, description: str, digest: str) -> None:
        self.examples, self.seed, self.description, self.sha256 = examples, seed, description, digest
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """The batch of a step, in its epoch's order."""
        per_epoch = max(1, len(self.examples) // count)
        batch = self._order(step // per_epoch, count)[step % per_epoch]
        return (self.examples[i] for i in batch)

    def _shuffled(self, epoch: int, count: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{self.sha256}/{epoch}")
        order = rng.sample(range(len(self.examples)), len(self.examples))
        order *= -(-count // len(order))  # a batch may be larger than the whole list
        del order[len(order) // count * count :]  # before sorting, so that each epoch leaves out others
        batches = []
        for start in range(0, len(order), _WINDOW * count):
            window = sorted(order[start : start + _WINDOW * count], key=lambda i: len(self.examples[i].question))
            batches += [window[i : i + count] for i in range(0, len(window), count)]
        rng.shuffle(batches)
        return batches


class WithSteps(Source):
    """The questions of a generator, whose steps follow each question as part of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.description = source, f"{source.description}, steps written"

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """The same questions in the same order."""
        return map(_with_steps, self.source.draw(step, count, rng))


def _with_steps(example: Example) -> Example:
    return replace(example, question=" ".join((example.question, *example.steps)), steps=())


class PlainText(Source):
    """Pieces of a text, each cut at a space into a prompt and its continuation."""

    def __init__(self, path: str, characters: int) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
        if len(text) <= characters:
            raise DataError(f"{path}: expected more than {characters} characters, got {len(text)}")
        self.text, self.characters = text, characters
        self.description, self.sha256 = f"text: {Path(path).name}", sha256(text.encode("utf-8")).hexdigest()

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """Pieces from random places of the text."""
        for _ in range(count):
            start = rng.randrange(len(self.text) - self.characters)
            piece = _whole_words(self.text[start : start + self.characters])
            cut = piece.find(" ", rng.randint(len(piece) // 4, len(piece) // 2))
            cut = cut if cut > 0 else len(piece) // 2
            yield Example(piece[:cut], (), piece[cut:], {CONTINUES: True})


def _whole_words(piece: str) -> str:
    """A piece of text without the words that are cut at its ends; all of it if it has no spaces to cut at."""
    inner = piece.partition(" ")[2].rpartition(" ")[0]
    return inner if inner.strip() else piece


@cache
def _read(task: str, file: str | None, split: str | None, modified: int | None) -> Questions:
    # Stages name the same file again and again; in a notebook it may change between two runs.
    return load_questions(tasks.get_task(task), data=file, split=split)


def load_source_questions(config: DataConfig) -> Questions:
    """The questions of a file or split; they are read once.

    Raises:
        DataError: they cannot be read, or the task cannot grade one of them.
        ConfigError: the task does not have what is asked of it.
    """
    assert config.task is not None  # the config has checked it
    file = None if config.file is None else Path(config.file)
    modified = file.stat().st_mtime_ns if file is not None and file.is_file() else None
    return _read(config.task, config.file, config.split, modified)


def split_held_out(examples: Sequence[Example], count: int, source: str) -> tuple[list[Example], list[Example]]:
    """Questions to train on, and held-out ones: ``count`` different questions with all their repetitions.

    Which ones depends on the questions alone: not on a seed, nor on their order.

    Raises:
        DataError: nothing would be left to train on.
    """
    if not count:
        return list(examples), []
    different = sorted({example.question for example in examples}, key=_digest)
    if count >= len(different):
        raise DataError(f"{source}: held_out must be below its {len(different)} different questions, got {count}")
    kept_out = set(different[:count])
    training = [example for example in examples if example.question not in kept_out]
    return training, [example for example in examples if example.question in kept_out]


def _digest(question: str) -> str:
    return sha256(question.encode("utf-8", "surrogatepass")).hexdigest()


def open_source(config: DataConfig, seed: int, held_out: int = 0) -> Source:
    """Open the source of a config; read its file.

    Args:
        config: what to read or generate.
        seed: of the order of a list, and of a list that is generated.
        held_out: different questions that a file or split keeps out of training.

    Raises:
        DataError: the file or split cannot be read, or keeps nothing to train on.
        ConfigError: the task does not exist, or has no such split or generator.
    """
    if config.write_steps:
        source = open_source(config.model_copy(update={"write_steps": False}), seed, held_out)
        if isinstance(source, Listed):
            described = f"{source.description}, steps written"
            return Listed([*map(_with_steps, source.examples)], seed, described, source.sha256)
        return WithSteps(source)
    if config.text is not None:
        return PlainText(config.text, config.characters)
    assert config.task is not None  # checked by the config
    task = tasks.get_task(config.task)
    if not config.generated:
        questions = load_source_questions(config)
        examples, kept_out = split_held_out(questions.examples, held_out, questions.source)
        about = f", {len(kept_out)} of {len(questions.examples)} held out" if kept_out else ""
        examples = _prompts(task, examples)
        return Listed(examples, seed, f"{config.task}, {questions.source}{about}", questions.sha256)
    if config.questions is not None:
        options = config.generator_options
        questions = load_questions(task, generate=config.questions, seed=seed, generator_options=options)
        examples = _prompts(task, questions.examples)
        return Listed(examples, seed, f"{config.task}, {questions.source}", questions.sha256)
    if config.graphs:
        return Graphs(GraphSpec(**task.generator_settings(config.generator_options)))  # type: ignore[arg-type]
    return Generated(task, dict(config.generator_options))
