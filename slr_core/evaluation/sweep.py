"""Train a recipe with different settings and seeds, or take finished models, and evaluate all in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core import tasks
from slr_core.engine.runner.device import load_reasoner
from slr_core.errors import ConfigError, RequestError
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import Method, MethodSettings, get_method
from slr_core.evaluation.run import identify_model, run_method, run_spec
from slr_core.evaluation.statistics import Summary, summarize
from slr_core.evaluation.store import MethodRun, Store
from slr_core.params import LoopParams
from slr_core.suggest import did_you_mean
from slr_core.tasks.base import OptionValue, Task
from slr_core.tasks.sources import Questions, load_questions
from slr_core.training.config import TrainConfig
from slr_core.training.resume import check_recipe, check_trained, holds_run
from slr_core.training.trainer import MANIFEST, train
from slr_core.validation import validated
from slr_core.yaml_text import parse_yaml


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SweepEvaluation(_Model):
    """Questions that every model of a sweep answers, and the methods that answer them."""

    name: str | None = Field(None, description="short name of the questions, for tables")
    task: str
    data: str | None = Field(None, description="file of questions, .jsonl or .jsonl.gz")
    split: str | None = Field(None, description="split of the task's public data set")
    generate: int | None = Field(None, ge=1, description="number of questions to generate")
    seed: int = Field(0, ge=0, description="seed of the generated questions")
    generator_options: dict[str, OptionValue] = Field({}, description="options of the question generator")
    limit: int | None = Field(None, ge=1)
    methods: tuple[str, ...] = Field(("slr",), min_length=1, description="methods that answer, each with every model")
    loop: dict[str, int | float | str] = Field({}, description="loop parameters, for all methods")
    iterations: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="numbers of iterations without early exit; all questions are answered once for each"
    )
    variants: tuple[str, ...] = Field(
        (),
        description="names in `variants` or `models` whose models answer; empty: all. Methods with weights of their "
        "own, such as `cot`, need it: it names the variants trained for them",
    )

    @model_validator(mode="after")
    def _check_iterations(self) -> Self:
        if self.iterations and (self.loop.keys() & {"criterion", "max_iterations", "min_iterations"}):
            raise ValueError("give either iterations or loop.criterion, max_iterations and min_iterations")
        known = [field.name for field in fields(LoopParams)]
        for name in self.loop:
            if name not in known:
                raise ValueError(f"loop.{name}: unknown field; there are {', '.join(known)}{did_you_mean(name, known)}")
        try:
            LoopParams(**self.loop)  # type: ignore[arg-type]  # checked here
        except (TypeError, RequestError) as error:
            raise ValueError(f"loop: {error}") from error
        return self

    @property
    def loops(self) -> list[dict[str, int | float | str]]:
        """The loop parameters with which the questions are answered, in turn."""
        if not self.iterations:
            return [dict(self.loop)]
        return [{**self.loop, "criterion": "fixed", "max_iterations": t, "min_iterations": t} for t in self.iterations]


class SweepConfig(_Model):
    """The sweep file."""

    recipe: str | None = Field(None, description="training recipe, relative to the folder of the sweep file")
    models: dict[str, str] = Field(
        {}, description="finished models by name, in place of a recipe: checkpoint folders or hub ids"
    )
    output_dir: str = Field(description="folder for the models and results.jsonl")
    set: dict[str, Any] = Field({}, description="settings of the recipe for every model, by dotted name")
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        {}, description="values per setting; every combination is trained"
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="named sets of settings; each is combined with all of `vary`"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="training seeds, for each combination")
    evaluate: tuple[SweepEvaluation, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if (self.recipe is None) == (not self.models):
            raise ValueError("give either recipe or models")
        if self.models and self.model_fields_set & {"set", "vary", "variants", "seeds"}:
            raise ValueError("set, vary, variants and seeds are settings of a training: models have none")
        for place, names in (("set", self.set), ("vary", self.vary), *self.variants.items()):
            for name, instead in (("seed", "seeds"), ("output_dir", "output_dir of the sweep")):
                if name in names:
                    raise ValueError(f"{place}: {name} is set for every model; give {instead}")
        for variant, changes in self.variants.items():
            if both := sorted(changes.keys() & self.vary.keys()):
                raise ValueError(f"variants.{variant}: {both[0]} is in vary too, whose values would replace it")
        known = self.models or self.variants
        for name in (name for evaluation in self.evaluate for name in evaluation.variants):
            if name not in known:
                raise ValueError(f"evaluate.variants: {name} is not one of {', '.join(known) or 'no names'}")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a sweep file.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
        """
        try:
            data = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        try:
            return validated(cls, data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Variant:
    """One model of a sweep.

    Attributes:
        values: the settings that vary, by dotted name, and the name in ``variants``, if any, as ``variant``.
        seed: training seed; ``None`` for a finished model.
        folder: the model.
        config: the recipe; ``None`` for a finished model.
    """

    values: dict[str, Any]
    seed: int | None
    folder: str
    config: TrainConfig | None

    @property
    def label(self) -> str:
        """The settings that vary, without the seed."""
        named = (_plain(value) if key == "variant" else f"{key}={_plain(value)}" for key, value in self.values.items())
        return ", ".join(named)

    @property
    def name(self) -> str:
        """A name for the model: the label and the seed."""
        if self.seed is None:
            return self.label
        return f"{self.label}, seed={self.seed}" if self.values else f"seed={self.seed}"


def expand_variants(sweep: SweepConfig, folder: Path) -> Iterator[Variant]:
    """Yield every model of a sweep whose file lies in ``folder``; all have their first seed before any has a second.

    Raises:
        ConfigError: a setting or a combination is not valid in the recipe.
    """
    if sweep.recipe is None:
        for name, place in sweep.models.items():
            yield Variant({"variant": name}, None, place, None)
        return
    named = [({"variant": name}, changes) for name, changes in sweep.variants.items()] or [({}, {})]
    for seed, (name, changes), values in product(sweep.seeds, named, product(*sweep.vary.values())):
        chosen = dict(zip(sweep.vary, values, strict=True))
        settings = {**sweep.set, **changes, **chosen, "seed": seed}
        place = str(Path(sweep.output_dir) / "models" / _slug({**name, **chosen, "seed": seed}, settings))
        # JSON is valid YAML.
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in {**settings, "output_dir": place}.items())
        yield Variant({**name, **chosen}, seed, place, TrainConfig.from_yaml(folder / sweep.recipe, overrides))


@dataclass(frozen=True)
class SweepRow:
    """One model's figures on one set of questions by one method.

    Attributes:
        variant: the model.
        name: short name of the questions, if the sweep file has one.
        questions: task, source and changed loop parameters.
        questions_sha256: hash of the questions.
        loop: changed loop parameters.
        method: name of the method.
        model_sha256: hash of the model; ``None`` for a hub id.
        summary: the figures.
    """

    variant: Variant
    name: str | None
    questions: str
    questions_sha256: str
    loop: dict[str, int | float | str]
    method: str
    model_sha256: str | None
    summary: Summary

    def to_json(self) -> dict[str, Any]:
        """The row as JSON, without the recipe."""
        return {
            "variant": self.variant.label,
            "seed": self.variant.seed,
            "name": self.name,
            "question_set": self.questions,
            "questions_sha256": self.questions_sha256,
            "loop": self.loop,
            "method": self.method,
            "model_sha256": self.model_sha256,
            **asdict(self.summary),
        }


def run_sweep(
    spec: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    about: dict[str, Any] | None = None,
    finished_only: bool = False,
    progress: Callable[[str], None] = lambda step: None,
    train_all: Callable[[list[TrainConfig]], None] | None = None,
) -> list[SweepRow]:
    """Train and evaluate the models of a sweep; an interrupted sweep continues.

    Args:
        spec: the sweep file, see :class:`SweepConfig`.
        device: device of the evaluation, see :func:`~slr_core.engine.runner.device.resolve_device`.
        dtype: dtype of the evaluation, see :func:`~slr_core.engine.runner.device.load_reasoner`.
        quantization: that of the evaluation, as above.
        about: entries for the manifest of the results.
        finished_only: return the stored figures of the models that have all of them; train and evaluate nothing.
        progress: called with a description of each step.
        train_all: trains all models that are not finished, before the first one is evaluated. Default: each is trained
            in this process when its turn comes.

    Raises:
        ConfigError: the sweep file, a recipe or a method is invalid.
        TrainingError: a training failed.
    """
    sweep = SweepConfig.from_yaml(spec)
    planned = list(expand_variants(sweep, Path(spec).parent))
    evaluations = list(_open_evaluations(sweep))
    store, rows, precision = Store(Path(sweep.output_dir) / "results.jsonl"), [], (dtype, quantization)
    for variant in planned:
        folder = Path(variant.folder)
        if variant.config and (folder / MANIFEST).is_file():
            check_trained(folder / MANIFEST, variant.config)
        elif variant.config and holds_run(folder / "steps"):
            check_recipe(folder / "steps", variant.config)
    if train_all is not None and not finished_only:
        unfinished = [v.config for v in planned if v.config and not (Path(v.folder) / MANIFEST).is_file()]
        progress(f"training {len(unfinished)} models")
        train_all(unfinished)
    for i, variant in enumerate(planned, start=1):
        config = variant.config
        trained = config is None or (Path(variant.folder) / MANIFEST).is_file()
        runs = [run for run in evaluations if run.applies_to(variant)]
        if finished_only:
            rows += _stored_rows(store, variant, runs, precision) if trained else []
            continue
        if config is not None and not trained:
            progress(f"{i} of {len(planned)}: training {variant.name}")
            train(config, resume=holds_run(Path(variant.folder) / "steps"))
        progress(f"{i} of {len(planned)}: evaluating {variant.name}")
        backend = Local(load_reasoner(variant.folder, device=device, dtype=dtype, quantization=quantization))
        for run in runs:
            opened = store.open(run.spec(variant, precision), about)
            task, examples = run.task, run.questions.examples
            outcomes = run_method(
                run.method, backend, task, examples, run.settings, store=store, run=opened, warm_up=True
            )
            rows.append(run.row(variant, opened, summarize(outcomes)))
    return rows


@dataclass(frozen=True)
class _EvaluationRun:
    """One method with one set of loop parameters on one set of questions."""

    evaluation: SweepEvaluation
    questions: Questions
    loop: dict[str, int | float | str]
    method: Method

    @property
    def task(self) -> Task:
        return tasks.get_task(self.evaluation.task)

    @property
    def settings(self) -> MethodSettings:
        return MethodSettings(dict(self.loop))

    def applies_to(self, variant: Variant) -> bool:
        return not self.evaluation.variants or variant.values.get("variant") in self.evaluation.variants

    def spec(self, variant: Variant, precision: tuple[str, str]) -> dict[str, Any]:
        model = {**identify_model(variant.folder, *precision), "name": variant.name}
        return run_spec(self.method, self.settings, self.task, self.questions, model)

    def row(self, variant: Variant, answered: MethodRun, summary: Summary) -> SweepRow:
        changed = "".join(f"; {name}={value}" for name, value in self.loop.items())
        described = f"{self.evaluation.task}: {self.questions.source}{changed}"
        model, questions, name = answered.spec["model"].get("sha256"), self.questions.sha256, self.evaluation.name
        return SweepRow(variant, name, described, questions, self.loop, self.method.name, model, summary)


def _open_evaluations(sweep: SweepConfig) -> Iterator[_EvaluationRun]:
    for evaluation in sweep.evaluate:
        questions = load_questions(
            tasks.get_task(evaluation.task),
            data=evaluation.data,
            split=evaluation.split,
            generate=evaluation.generate,
            seed=evaluation.seed,
            generator_options=evaluation.generator_options,
            limit=evaluation.limit,
        )
        for loop, name in product(evaluation.loops, evaluation.methods):
            method = get_method(name)
            if method.weights is not None and not evaluation.variants:
                raise ConfigError(
                    f"evaluate.methods: {name} needs weights trained for it: name their variants in evaluate.variants"
                )
            yield _EvaluationRun(evaluation, questions, loop, method)


def _stored_rows(
    store: Store, variant: Variant, runs: list[_EvaluationRun], precision: tuple[str, str]
) -> list[SweepRow]:
    """The figures of a model whose runs are all complete; else none."""
    stored = [store.runs.get(MethodRun(run.spec(variant, precision)).id) for run in runs]
    complete = [found for found in stored if found is not None and len(found.outcomes) == found.spec["questions"]]
    if len(complete) < len(runs):
        return []
    return [
        run.row(variant, found, summarize(list(found.outcomes.values())))
        for run, found in zip(runs, complete, strict=True)
    ]


def _slug(values: dict[str, Any], settings: dict[str, Any]) -> str:
    text = "_".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in values.items())
    # With a hash of the settings: shortened names may be equal, and a variant may be redefined.
    readable = "".join(c if c.isalnum() or c in "=_.-" else "-" for c in text)[:100]
    return f"{readable}_{sha256(json.dumps(settings).encode('utf-8')).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
