"""Train a recipe with different settings and seeds, or take finished models, and evaluate all in the same way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from slr_core import tasks
from slr_core.checkpoint.folder import missing_folder
from slr_core.engine.runner.device import load_reasoner
from slr_core.errors import ConfigError, DataError
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import Method, MethodSettings, get_method
from slr_core.evaluation.run import identify_model, run_method, run_spec
from slr_core.evaluation.statistics import Summary, summarize
from slr_core.evaluation.store import MethodRun, Store
from slr_core.evaluation.sweep_config import SweepConfig, SweepEvaluation, canonical_json
from slr_core.tasks.base import Task
from slr_core.tasks.sources import Questions, load_questions
from slr_core.training.config import TrainConfig
from slr_core.training.resume import check_recipe, check_trained, holds_run
from slr_core.training.trainer import MANIFEST, train

RESULTS = "results.jsonl"
"""File in ``output_dir`` with every answer."""


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
        DataError: a file of questions without a task cannot be read.
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
        variant = Variant({**name, **chosen}, seed, place, None)
        with _prefix(variant.name):
            config = TrainConfig.from_yaml(folder / sweep.recipe, overrides)
        yield replace(variant, config=config)


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
    loop: dict[str, Any]
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
        ConfigError: the sweep file, a recipe or a method is invalid, or a model or a file does not exist.
        DataError: a file of questions cannot be read.
        TrainingError: a training failed.
    """
    sweep = SweepConfig.from_yaml(spec)
    with _prefix(str(spec)):
        planned = list(expand_variants(sweep, Path(spec).parent))
        evaluations = list(_open_evaluations(sweep))
        for variant in planned:
            if variant.config is None or not finished_only:
                _check_inputs(variant)
            _check_runs([run for run in evaluations if run.applies_to(variant)])
    store = Store(Path(sweep.output_dir) / RESULTS, read_only=finished_only)
    rows, precision = list[SweepRow](), (dtype, quantization)
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
    if finished_only:
        complete = {row.variant.name for row in rows}
        progress(f"{len(complete)} of {len(planned)} models have all their figures")
    return rows


@contextmanager
def _prefix(name: str) -> Iterator[None]:
    """Say which file, model or field an error is about."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{name}: {error}") from error


def _check_inputs(variant: Variant) -> None:
    """Check that what a model is loaded or trained from exists."""
    config = variant.config
    needed: dict[str, str | None]
    if config is None:
        needed = {f"models.{variant.label}": variant.folder}
    elif (Path(variant.folder) / MANIFEST).is_file():
        return
    else:
        needed = {"base.from": config.base.source, "teacher": config.teacher}
    for name, place in needed.items():
        if place is not None and (reason := missing_folder(place)) is not None:
            raise ConfigError(f"{name}: {place}: {reason}")
    for file in [data.file or data.text for stage in config.schedule for data in stage.data] if config else []:
        if file is not None and not Path(file).is_file():
            raise DataError(f"{variant.name}: {file}: no such file")


@dataclass(frozen=True)
class _EvaluationRun:
    """One method with one set of loop parameters on one set of questions."""

    evaluation: SweepEvaluation
    questions: Questions
    loop: dict[str, Any]
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
        model = identify_model(variant.folder, *precision)
        if "sha256" not in model:  # of a model of the hub, the id is all that is known
            model["id"] = model["name"]
        return run_spec(self.method, self.settings, self.task, self.questions, {**model, "name": variant.name})

    def row(self, variant: Variant, answered: MethodRun, summary: Summary) -> SweepRow:
        changed = "".join(f"; {name}={value}" for name, value in self.loop.items())
        described = f"{self.evaluation.task}: {self.questions.source}{changed}"
        model, questions, name = answered.spec["model"].get("sha256"), self.questions.sha256, self.evaluation.name
        return SweepRow(variant, name, described, questions, self.loop, self.method.name, model, summary)


def _open_evaluations(sweep: SweepConfig) -> Iterator[_EvaluationRun]:
    for i, evaluation in enumerate(sweep.evaluate):
        with _prefix(f"evaluate.{i}"):
            questions = load_questions(
                tasks.get_task(evaluation.task),
                data=evaluation.data,
                split=evaluation.split,
                generate=evaluation.generate,
                seed=evaluation.seed,
                generator_options=evaluation.generator_options,
                limit=evaluation.limit,
            )
            methods = [get_method(name) for name in evaluation.methods]
            for method in methods:
                if method.weights is not None and not evaluation.variants:
                    raise ConfigError(
                        f"methods: {method.name} needs weights trained for it: name their variants in variants"
                    )
        for loop, method in product(evaluation.loops, methods):
            yield _EvaluationRun(evaluation, questions, loop, method)


def _check_runs(runs: list[_EvaluationRun]) -> None:
    """Check that no model is to answer the same questions twice in the same way: it would count as two seeds."""
    asked = Counter((run.task.name, run.method.name, run.questions.sha256, canonical_json(run.loop)) for run in runs)
    for (task, method, *_), count in asked.items():
        if count > 1:
            raise ConfigError(f"evaluate: the same {task} questions are asked {count} times with the method {method}")


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
    readable = "".join(c if c.isalnum() or c in "=_.-" else "-" for c in text)
    short = readable.encode("utf-8")[:100].decode("utf-8", errors="ignore")  # file systems count bytes
    return f"{short}_{sha256(canonical_json(settings).encode('utf-8')).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
