"""Where a batch's examples come from: a generator, a task's file or split, or plain text."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

from slr_core import tasks
from slr_core.errors import DataError
from slr_core.tasks.base import Example, OptionValue, Task
from slr_core.tasks.prosqa import GraphSpec, generate_graph, to_example
from slr_core.tasks.sources import load_questions
from slr_core.training.stages import DataConfig

CONTINUES = "continues"
"""Extra field of a piece of plain text: it does not end where it is cut."""

_WINDOW = 32  # batches whose questions are sorted by length: little of a batch is padding


class Source(ABC):
    """Examples of one kind.

    Attributes:
        about: for the manifest: where they come from.
        sha256: of files, None for what is generated.
    """

    about: str
    sha256: str | None = None

    @abstractmethod
    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """The examples of a step, from nothing but the arguments."""


class Graphs(Source):
    """ProsQA graphs, drawn one by one from the step's own generator."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec, self.about = spec, f"prosqa, generated: {spec}"

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """Fresh graphs."""
        for _ in range(count):
            yield to_example(generate_graph(self.spec, rng), rng)


class Generated(Source):
    """The questions of any other task's generator."""

    def __init__(self, task: Task, generator_options: dict[str, OptionValue]) -> None:
        self.task, self.generator_options = task, generator_options
        self.about = f"{task.name}, generated: {dict(task.generator_options) | generator_options}"

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """Fresh questions, from a seed of the step."""
        return islice(self.task.generate(rng.getrandbits(63), **self.generator_options), count)


class Listed(Source):
    """A finite list, gone through again and again in a new order, questions of like length together."""

    def __init__(self, examples: Sequence[Example], seed: int, about: str, digest: str) -> None:
        self.examples, self.seed, self.about, self.sha256 = examples, seed, about, digest
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """The batch of a step: a slice of the order of its epoch."""
        per_epoch = max(1, len(self.examples) // count)
        batch = self._order(step // per_epoch, count)[step % per_epoch]
        return (self.examples[i] for i in batch)

    def _shuffled(self, epoch: int, count: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{self.sha256}/{epoch}")
        order = rng.sample(range(len(self.examples)), len(self.examples))
        order *= -(-count // len(order))  # a batch may be larger than the whole list
        del order[len(order) // count * count :]  # before they are sorted: other ones wait every time
        batches = []
        for start in range(0, len(order), _WINDOW * count):
            window = sorted(order[start : start + _WINDOW * count], key=lambda i: len(self.examples[i].question))
            batches += [window[i : i + count] for i in range(0, len(window), count)]
        rng.shuffle(batches)
        return batches


class PlainText(Source):
    """Pieces of a text between blanks, each cut at another blank into what is read and what is written."""

    def __init__(self, path: str, characters: int) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
        if len(text) <= characters:
            raise DataError(f"{path}: expected more than {characters} characters, got {len(text)}")
        self.text, self.characters = text, characters
        self.about, self.sha256 = f"text: {Path(path).name}", sha256(text.encode("utf-8")).hexdigest()

    def draw(self, step: int, count: int, rng: random.Random) -> Iterator[Example]:
        """Pieces from anywhere in the text."""
        for _ in range(count):
            start = rng.randrange(len(self.text) - self.characters)
            # Whole words: a cut one would be a riddle.
            piece = self.text[start : start + self.characters].partition(" ")[2].rpartition(" ")[0]
            cut = piece.find(" ", rng.randint(len(piece) // 4, len(piece) // 2))
            cut = cut if cut > 0 else len(piece) // 2
            yield Example(piece[:cut], (), piece[cut:], {CONTINUES: True})


@cache
def _read(task: str, file: str | None, split: str | None) -> tuple[tuple[Example, ...], str, str]:
    # Stages name the same file again and again.
    questions = load_questions(tasks.get_task(task), data=file, split=split)
    return questions.examples, questions.source, questions.sha256


def source_of(config: DataConfig, seed: int) -> Source:
    """The source that a config describes, its file read.

    Raises:
        DataError: the file or split cannot be read.
        ConfigError: the task does not have what is asked of it.
    """
    if config.text is not None:
        return PlainText(config.text, config.characters)
    assert config.task is not None  # the config has checked it
    if not config.generated:
        examples, about, digest = _read(config.task, config.file, config.split)
        return Listed(examples, seed, f"{config.task}, {about}", digest)
    task = tasks.get_task(config.task)
    if config.graphs:
        return Graphs(GraphSpec(**config.generator_options))  # type: ignore[arg-type]  # checked by the config
    return Generated(task, dict(config.generator_options))
