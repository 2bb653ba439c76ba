"""Train a recipe with different settings and seeds, and evaluate every model in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field

from slr_core import tasks
from slr_core.config import validated
from slr_core.engine.runner.device import load_reasoner
from slr_core.errors import ConfigError
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import MethodSettings, get_method
from slr_core.evaluation.run import identify_model, run_method, run_spec
from slr_core.evaluation.statistics import Summary, summarize
from slr_core.evaluation.store import Store
from slr_core.tasks.base import OptionValue
from slr_core.tasks.sources import load_questions
from slr_core.training.config import TrainConfig
from slr_core.training.trainer import MANIFEST, train


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SweepEvaluation(_Model):
    """Questions that every model of a sweep answers, and the methods that answer them."""

    task: str
    data: str | None = Field(None, description="file of questions, .jsonl or .jsonl.gz")
    split: str | None = Field(None, description="split of the task's public data set")
    generate: int | None = Field(None, ge=1, description="number of questions to generate")
    seed: int = Field(0, ge=0, description="seed of the generated questions")
    generator_options: dict[str, OptionValue] = Field({}, description="options of the question generator")
    limit: int | None = Field(None, ge=1)
    methods: tuple[str, ...] = Field(("slr",), min_length=1, description="methods that answer, each with every model")
    loop: dict[str, int | float | str] = Field({}, description="loop parameters, for all methods")


class SweepConfig(_Model):
    """The sweep file."""

    recipe: str = Field(description="training recipe, relative to the folder of the sweep file")
    output_dir: str = Field(description="folder for the models and results.jsonl")
    set: dict[str, Any] = Field({}, description="settings of the recipe for every model, by dotted name")
    vary: dict[str, tuple[Any, ...]] = Field({}, description="values per setting; every combination is trained")
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="named sets of settings; each is combined with all of `vary`"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="training seeds, for each combination")
    evaluate: tuple[SweepEvaluation, ...] = Field(min_length=1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a sweep file.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        return validated(cls, data)


@dataclass(frozen=True)
class Variant:
    """One model of a sweep.

    Attributes:
        values: the settings that vary, by dotted name, and the name in ``variants``, if any, as ``variant``.
        seed: training seed.
        config: the recipe.
    """

    values: dict[str, Any]
    seed: int
    config: TrainConfig

    @property
    def label(self) -> str:
        """The settings that vary, without the seed."""
        named = (_plain(value) if key == "variant" else f"{key}={_plain(value)}" for key, value in self.values.items())
        return ", ".join(named)

    @property
    def name(self) -> str:
        """A name for the model: the label and the seed."""
        return f"{self.label}, seed={self.seed}" if self.values else f"seed={self.seed}"


def expand_variants(sweep: SweepConfig, folder: Path) -> Iterator[Variant]:
    """Yield every model of a sweep whose file lies in ``folder``.

    Raises:
        ConfigError: a setting or a combination is not valid in the recipe.
    """
    named = [({"variant": name}, changes) for name, changes in sweep.variants.items()] or [({}, {})]
    for (name, changes), values in product(named, product(*sweep.vary.values())):
        chosen = dict(zip(sweep.vary, values, strict=True))
        for seed in sweep.seeds:
            settings = {**sweep.set, **changes, **chosen, "seed": seed}
            place = Path(sweep.output_dir) / "models" / _slug({**name, **chosen, "seed": seed}, settings)
            # JSON is valid YAML.
            overrides = tuple(
                f"{key}={json.dumps(value)}" for key, value in {**settings, "output_dir": str(place)}.items()
            )
            yield Variant({**name, **chosen}, seed, TrainConfig.from_yaml(folder / sweep.recipe, overrides))


@dataclass(frozen=True)
class SweepRow:
    """One model's figures on one set of questions by one method.

    Attributes:
        variant: the model.
        questions: task, source and changed loop parameters.
        method: name of the method.
        summary: the figures.
    """

    variant: Variant
    questions: str
    method: str
    summary: Summary

    def to_json(self) -> dict[str, Any]:
        """The row as JSON, without the recipe."""
        return {
            "variant": self.variant.label,
            "seed": self.variant.seed,
            "question_set": self.questions,
            "method": self.method,
            **asdict(self.summary),
        }


def run_sweep(
    spec: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    about: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[SweepRow]:
    """Train and evaluate the models of a sweep; an interrupted sweep continues.

    Args:
        spec: the sweep file, see :class:`SweepConfig`.
        device: device of the evaluation, see :func:`~slr_core.engine.runner.device.resolve_device`.
        dtype: dtype of the evaluation, see :func:`~slr_core.engine.runner.device.load_reasoner`.
        about: entries for the manifest of the results.
        progress: called with a description of each step.

    Raises:
        ConfigError: the sweep file, a recipe or a method is invalid.
        TrainingError: a training failed.
    """
    sweep = SweepConfig.from_yaml(spec)
    planned = list(expand_variants(sweep, Path(spec).parent))
    evaluations = [
        (
            evaluation,
            load_questions(
                tasks.get_task(evaluation.task),
                data=evaluation.data,
                split=evaluation.split,
                generate=evaluation.generate,
                seed=evaluation.seed,
                generator_options=evaluation.generator_options,
                limit=evaluation.limit,
            ),
            [get_method(name) for name in evaluation.methods],
        )
        for evaluation in sweep.evaluate
    ]
    for _, _, methods in evaluations:
        for method in methods:
            if method.weights is not None:
                raise ConfigError(
                    f"evaluate.methods: {method.name} needs weights trained for it, which a sweep does not have"
                )
    store, rows = Store(Path(sweep.output_dir) / "results.jsonl"), []
    for i, variant in enumerate(planned, start=1):
        place = Path(variant.config.output_dir)
        if not (place / MANIFEST).is_file():
            progress(f"{i} of {len(planned)}: training {variant.name}")
            train(variant.config, resume=any((place / "steps").glob("checkpoint-*")))
        progress(f"{i} of {len(planned)}: evaluating {variant.name}")
        backend = Local(load_reasoner(str(place), device=device, dtype=dtype))
        model = {**identify_model(str(place)), "name": variant.name}
        for evaluation, questions, methods in evaluations:
            task, settings = tasks.get_task(evaluation.task), MethodSettings(dict(evaluation.loop))
            for method in methods:
                opened = store.open(run_spec(method, settings, task, questions, model), about)
                outcomes = run_method(
                    method, backend, task, questions.examples, settings, store=store, run=opened, warm_up=True
                )
                rows.append(
                    SweepRow(variant, _describe(evaluation, questions.source), method.name, summarize(outcomes))
                )
    return rows


def _describe(evaluation: SweepEvaluation, source: str) -> str:
    settings = "".join(f"; {name}={value}" for name, value in evaluation.loop.items())
    return f"{evaluation.task}: {source}{settings}"


def _slug(values: dict[str, Any], settings: dict[str, Any]) -> str:
    text = "_".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in values.items())
    # With a hash of the settings: shortened names may be equal, and a variant may be redefined.
    readable = "".join(c if c.isalnum() or c in "=_.-" else "-" for c in text)[:100]
    return f"{readable}_{sha256(json.dumps(settings).encode('utf-8')).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
