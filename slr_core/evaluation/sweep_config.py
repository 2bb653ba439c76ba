"""The file of ``slr sweep``: what is trained or loaded, and the questions that every model answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core.errors import ConfigError, RequestError
from slr_core.params import LoopParams
from slr_core.suggest import did_you_mean
from slr_core.tasks.base import OptionValue
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
    loop: dict[str, Any] = Field({}, description="loop parameters, for all methods")
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
            LoopParams(**self.loop)
        except RequestError as error:
            raise ValueError(f"loop.{error}") from error
        for name, values in (("methods", self.methods), ("iterations", self.iterations)):
            _check_once(name, values)
        return self

    @property
    def loops(self) -> list[dict[str, Any]]:
        """The loop parameters with which the questions are answered, in turn."""
        if not self.iterations:
            return [dict(self.loop)]
        return [{**self.loop, "criterion": "fixed", "max_iterations": t, "min_iterations": t} for t in self.iterations]


class SweepConfig(_Model):
    """The sweep file."""

    recipe: str | None = Field(None, description="training recipe, relative to the folder of the sweep file")
    models: dict[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = Field(
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
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0,), min_length=1, description="training seeds, for each combination"
    )
    evaluate: tuple[SweepEvaluation, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if (self.recipe is None) == (not self.models):
            raise ValueError("give either recipe or models")
        if self.models and self.model_fields_set & {"set", "vary", "variants", "seeds"}:
            raise ValueError("set, vary, variants and seeds are settings of a training: models have none")
        _check_once("seeds", self.seeds)
        for place, names in (("set", self.set), ("vary", self.vary), *self.variants.items()):
            for name in names:
                if "=" in name:
                    raise ValueError(f"{place}: expected dotted names of settings, got {name}")
            for name, instead in (("seed", "seeds"), ("output_dir", "output_dir of the sweep")):
                if name in names:
                    raise ValueError(f"{place}: {name} is set for every model; give {instead}")
            _check_not_hidden(place, list(names))
        for name, values in self.vary.items():
            _check_once(f"vary.{name}", values)
        for place, changes in (("set", self.set), *((f"variants.{name}", of) for name, of in self.variants.items())):
            for name, group in ((name, group) for name in changes for group in self.vary):
                # A value of `vary` may replace one of `set`; that it replaces a whole group hides the latter.
                if name.startswith(f"{group}.") or (name == group and place != "set"):
                    raise ValueError(f"{place}: {name} would be replaced by vary, which has {group}")
        known = self.models or self.variants
        for name in (name for evaluation in self.evaluate for name in evaluation.variants):
            if name not in known:
                raise ValueError(f"evaluate.variants: {name} is not one of {', '.join(known) or 'no names'}")
        if all(evaluation.variants for evaluation in self.evaluate):
            for name in known.keys() - {name for evaluation in self.evaluate for name in evaluation.variants}:
                raise ValueError(f"evaluate.variants: no entry names {name}, which would answer no question")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a sweep file.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
        """
        try:
            data = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        try:
            return validated(cls, data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def canonical_json(value: Any) -> str:
    """JSON in which equal settings are equal: sorted keys, and 1.0 as 1; ``true`` is another value."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return int(part) if isinstance(part, float) and part.is_integer() else part

    return json.dumps(plain(value), sort_keys=True)


def _check_once(name: str, values: Sequence[Any]) -> None:
    for (_, first), (j, second) in combinations(enumerate(values), 2):
        if canonical_json(first) == canonical_json(second):
            raise ValueError(f"{name}.{j}: {second} is given twice")


def _check_not_hidden(place: str, names: Sequence[str]) -> None:
    """Check that no group of settings follows one of its settings, which it would replace."""
    for name, group in combinations(names, 2):
        if name.startswith(f"{group}."):
            raise ValueError(f"{place}: {name} would be replaced by {group}, which follows it")
