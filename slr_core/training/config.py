"""What ``slr train`` reads: one YAML file, validated."""

from __future__ import annotations

import random
from math import exp, log
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core.config import LoopConfig, TextConfig, validated
from slr_core.errors import ConfigError
from slr_core.tasks.prosqa import GraphSpec


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ScratchConfig(_Model):
    """A Llama-shaped base model from random weights."""

    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_hidden_layers: int = Field(2, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    max_position_embeddings: int = Field(256, ge=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_attention_heads")
        return self


class OptimizerConfig(_Model):
    """AdamW with a warm-up and a cosine down to a floor."""

    learning_rate: float = Field(2e-3, gt=0, lt=1)
    final_share: float = Field(0.05, ge=0, le=1, description="of the learning rate, at the last step")
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(128, ge=1)


class ObjectiveWeights(_Model):
    """Weights of the loss terms; 0 switches a term off. See :mod:`slr_core.training.objectives`."""

    answer: float = Field(1.0, ge=0, description="cross-entropy of the answer's tokens")
    frontier: float = Field(1.0, ge=0, description="state t against the breadth-first frontier at distance t")
    start: float = Field(0.1, ge=0, description="h_0 against the first token of the answer: the un-looped model")
    chains: float = Field(1.0, ge=0, description="the frontier objective from other nodes of the same graph")
    fixed_point: float = Field(1.0, ge=0, description="once the work is done another iteration changes nothing")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("at least one weight must be above 0")
        return self


class GraphMix(_Model):
    """One kind of graph in a stage: the dials of :class:`slr_core.tasks.prosqa.GraphSpec`."""

    nodes: int
    min_hops: int
    max_hops: int
    balanced: bool = True

    @model_validator(mode="after")
    def _spec_is_possible(self) -> Self:
        self.spec()
        return self

    def spec(self) -> GraphSpec:
        """The generator's dials; they raise ConfigError where impossible."""
        return GraphSpec(self.nodes, self.min_hops, self.max_hops, self.balanced)


class SampledIterations(_Model):
    """A loop length drawn anew for every batch, log-normal Poisson as in Huginn (arXiv 2502.05171, section 3.3).

    ``1 + Poisson(exp(tau))`` with tau normal of standard deviation ``sigma`` and such a mean that the draw's
    mean is ``mean``, then clipped to ``least`` ... ``most``.
    """

    mean: float = Field(gt=1, le=64)
    sigma: float = Field(0.5, ge=0, le=2)
    least: int = Field(1, ge=1, le=64)
    most: int = Field(64, ge=1, le=64)

    @model_validator(mode="after")
    def _least_is_below_most(self) -> Self:
        if self.least > self.most:
            raise ValueError("least must be at most `most`")
        return self

    def draw(self, rng: random.Random) -> int:
        """A loop length."""
        rate = exp(rng.gauss(log(self.mean - 1) - self.sigma**2 / 2, self.sigma))
        # Knuth's method: `random` has no Poisson draw, and no other generator resumes by its step.
        count, product = 0, rng.random()
        while count < self.most and product > exp(-rate):
            count, product = count + 1, product * rng.random()
        return min(self.most, max(self.least, 1 + count))


class StageConfig(_Model):
    """A stretch of training with one mix of graphs and one loop length."""

    steps: int = Field(ge=1)
    iterations: Annotated[int, Field(ge=0, le=64)] | SampledIterations
    backprop: int | None = Field(
        None, ge=1, description="gradients reach the last so many iterations alone; None: all of them"
    )
    graphs: tuple[GraphMix, ...] = Field(min_length=1, description="each batch draws one of these at random")

    @property
    def longest(self) -> int:
        """The most iterations that a batch can have."""
        return self.iterations if isinstance(self.iterations, int) else self.iterations.most


class TrainConfig(_Model):
    """A whole recipe."""

    output_dir: str
    seed: int = 0
    base: ScratchConfig = ScratchConfig()
    loop: LoopConfig = LoopConfig()
    text: TextConfig = TextConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objectives: ObjectiveWeights = ObjectiveWeights()
    chains: int = Field(6, ge=0, description="other start nodes per graph for the objective `chains`")
    chain_length: int = Field(4, ge=1, description="their iterations, at most those of the stage")
    chain_spread: int = Field(
        0, ge=0, description="chains begin after 0 ... so many iterations: every adapter learns the same step"
    )
    max_iterations: int | None = Field(
        None, ge=0, description="caps every stage's iterations; 0 trains the control without the loop"
    )
    chain_of_thought: bool = Field(
        False, description="trains the method `cot`: the steps in words before the answer, in place of a loop"
    )
    save_steps: int = Field(500, ge=1)
    threads: int | None = Field(None, ge=1, description="torch threads; None: torch's own choice")
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _objectives_suit_the_loop(self) -> Self:
        terms, loops = self.objectives, self.max_iterations != 0
        if self.chain_of_thought and loops:
            raise ValueError("max_iterations must be 0 with chain_of_thought: it thinks in words or in a loop")
        loop = self.loop
        blind = loop.workspace != "append" or loop.timestep.noise_level or loop.projection.kind == "pause"
        if terms.chains and self.chains and loops and blind:
            raise ValueError(
                "objectives.chains must be 0 unless loop.workspace is `append`, loop.timestep.noise_level false and "
                "loop.projection.kind not `pause`"
            )
        if terms.start and loops and self.loop.workspace == "prompt":
            raise ValueError("objectives.start must be 0 in the workspace `prompt`, which never runs the plain prompt")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> Self:
        """Read a recipe; each override is ``dotted.name=value`` with a YAML value.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of settings")
        for override in overrides:
            _apply(data, override)
        return validated(cls, data)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def iterations(self, stage: StageConfig, rng: random.Random) -> int:
        """Loop length of a batch under the cap."""
        drawn = stage.iterations if isinstance(stage.iterations, int) else stage.iterations.draw(rng)
        return drawn if self.max_iterations is None else min(drawn, self.max_iterations)


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected dotted.name=value")
    *parents, last = name.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {parent} is not a group of settings")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error})") from error
