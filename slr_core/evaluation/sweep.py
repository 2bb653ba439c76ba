"""Train a recipe over values of its settings and over seeds, and evaluate every model alike."""

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
from slr_core.errors import ConfigError
from slr_core.evaluation.backends import Local
from slr_core.evaluation.methods import MethodSettings, get_method
from slr_core.evaluation.run import identify_model, run_method, run_spec
from slr_core.evaluation.statistics import Summary, summarize
from slr_core.evaluation.store import Store
from slr_core.model.reasoner import LatentReasoner
from slr_core.tasks.base import Dial
from slr_core.tasks.sources import load
from slr_core.training.config import TrainConfig
from slr_core.training.trainer import MANIFEST, train


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SweepEvaluation(_Model):
    """Questions that every model of a sweep is asked, and how."""

    task: str
    data: str | None = Field(None, description="a .jsonl or .jsonl.gz file")
    split: str | None = Field(None, description="a split of the public data set")
    generate: int | None = Field(None, ge=1, description="so many generated questions")
    seed: int = Field(0, ge=0, description="of the generated ones")
    dials: dict[str, Dial] = Field({}, description="of the generator")
    limit: int | None = Field(None, ge=1)
    methods: tuple[str, ...] = Field(("slr",), min_length=1, description="each on every model")
    loop: dict[str, int | float | str] = Field({}, description="changes of the loop's settings, for all methods")


class SweepConfig(_Model):
    """A whole ``SPEC.yaml``."""

    recipe: str = Field(description="the training recipe, relative to the spec's own folder")
    output_dir: str = Field(description="a folder per model, and results.jsonl, below it")
    set: dict[str, Any] = Field({}, description="settings of the recipe that hold for every model, by dotted name")
    vary: dict[str, tuple[Any, ...]] = Field({}, description="values per setting: every combination is trained")
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="settings by a name of their own, where a product says too much; each with all of `vary`"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each combination is trained with each")
    evaluate: tuple[SweepEvaluation, ...] = Field(min_length=1)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a spec.

        Raises:
            ConfigError: it is not YAML, or a field is unknown or out of range.
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
        values: what varies, by dotted name, and the name it has in the spec as ``variant``.
        seed: of its training.
        config: its recipe.
    """

    values: dict[str, Any]
    seed: int
    config: TrainConfig

    @property
    def label(self) -> str:
        """For tables: without the settings that all share, and without the seed."""
        named = (_plain(value) if key == "variant" else f"{key}={_plain(value)}" for key, value in self.values.items())
        return ", ".join(named)

    @property
    def name(self) -> str:
        """One model's own."""
        return f"{self.label}, seed={self.seed}" if self.values else f"seed={self.seed}"


def variants(sweep: SweepConfig, folder: Path) -> Iterator[Variant]:
    """Every model of a sweep whose spec lies in ``folder``, all checked before the first is trained.

    Raises:
        ConfigError: a setting or a combination is not one of the recipe's.
    """
    named = [({"variant": name}, own) for name, own in sweep.variants.items()] or [({}, {})]
    for (name, own), values in product(named, product(*sweep.vary.values())):
        chosen = dict(zip(sweep.vary, values, strict=True))
        for seed in sweep.seeds:
            settings = {**sweep.set, **own, **chosen, "seed": seed}
            place = Path(sweep.output_dir) / "models" / _slug({**name, **chosen, "seed": seed}, settings)
            # JSON is YAML.
            overrides = tuple(
                f"{key}={json.dumps(value)}" for key, value in {**settings, "output_dir": str(place)}.items()
            )
            yield Variant({**name, **chosen}, seed, TrainConfig.from_yaml(folder / sweep.recipe, overrides))


@dataclass(frozen=True)
class SweepRow:
    """One model's figures on one set of questions by one method.

    Attributes:
        variant: the model.
        questions: task, source and, where they are changed, the settings of the loop.
        method: by name.
        summary: the figures.
    """

    variant: Variant
    questions: str
    method: str
    summary: Summary

    def to_json(self) -> dict[str, Any]:
        """The row without the recipe."""
        return {
            "variant": self.variant.label,
            "seed": self.variant.seed,
            "asked": self.questions,
            "method": self.method,
            **asdict(self.summary),
        }


def run_sweep(
    spec: str | Path, *, about: dict[str, Any] | None = None, progress: Callable[[str], None] = lambda doing: None
) -> list[SweepRow]:
    """Train and evaluate what is not done yet; a sweep that was interrupted goes on where it was.

    Args:
        spec: a YAML file: :class:`SweepConfig`.
        about: facts for the manifest of the results.
        progress: told what is done next.

    Raises:
        ConfigError: the spec, a recipe or a method is wrong.
        TrainingError: a training did not go well.
    """
    sweep = SweepConfig.from_yaml(spec)
    planned = list(variants(sweep, Path(spec).parent))
    asked = [
        (
            judge,
            load(
                tasks.get(judge.task),
                data=judge.data,
                split=judge.split,
                generate=judge.generate,
                seed=judge.seed,
                dials=judge.dials,
                limit=judge.limit,
            ),
            [get_method(name) for name in judge.methods],
        )
        for judge in sweep.evaluate
    ]
    for _, _, methods in asked:
        for method in methods:
            if method.weights is not None:
                raise ConfigError(
                    f"evaluate.methods: {method.name} needs weights of its own, a sweep has one model each"
                )
    store, rows = Store(Path(sweep.output_dir) / "results.jsonl"), []
    for i, variant in enumerate(planned, start=1):
        place = Path(variant.config.output_dir)
        if not (place / MANIFEST).is_file():
            progress(f"{i} of {len(planned)}: training {variant.name}")
            train(variant.config, resume=any((place / "steps").glob("checkpoint-*")))
        progress(f"{i} of {len(planned)}: evaluating {variant.name}")
        backend = Local(LatentReasoner.from_pretrained(str(place)))
        model = {**identify_model(str(place)), "name": variant.name}
        for judge, questions, methods in asked:
            task, settings = tasks.get(judge.task), MethodSettings(dict(judge.loop))
            for method in methods:
                opened = store.open(run_spec(method, settings, task, questions, model), about)
                outcomes = run_method(
                    method, backend, task, questions.examples, settings, store=store, run=opened, warm_up=True
                )
                rows.append(SweepRow(variant, _asked(judge, questions.source), method.name, summarize(outcomes)))
    return rows


def _asked(judge: SweepEvaluation, source: str) -> str:
    settings = "".join(f"; {name}={value}" for name, value in judge.loop.items())
    return f"{judge.task}: {source}{settings}"


def _slug(values: dict[str, Any], settings: dict[str, Any]) -> str:
    text = "_".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in values.items())
    # Shortened names could meet, and a name in a spec can change its meaning, so each has a hash of its settings.
    readable = "".join(c if c.isalnum() or c in "=_.-" else "-" for c in text)[:100]
    return f"{readable}_{sha256(json.dumps(settings).encode('utf-8')).hexdigest()[:8]}"


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
