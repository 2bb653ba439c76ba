"""What ``slr train`` reads: one YAML file, validated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from slr_core.config import LoopConfig, TextConfig, validated
from slr_core.errors import ConfigError
from slr_core.training.stages import CurriculumConfig, RecipeModel, StageConfig


class BaseConfig(RecipeModel):
    """The base model: a Llama-shaped one from random weights, or one that exists already."""

    source: str | None = Field(
        None,
        alias="from",
        description="a folder or hub id of a causal language model, or a latent reasoner's checkpoint",
    )
    tokenizer: str = Field(
        "prosqa",
        description="of a model from random weights: prosqa, prontoqa (few tokens per fact), words (one token a word, "
        "of the training data's own), or a folder or hub id",
    )
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(384, ge=8)
    num_hidden_layers: int = Field(2, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    max_position_embeddings: int = Field(256, ge=16)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 2 * num_attention_heads")
        if self.source is not None and (extra := sorted(self.model_fields_set - {"source"})):
            raise ValueError(f"`from` brings its own tokenizer and sizes: leave out {', '.join(extra)}")
        return self


class OptimizerConfig(RecipeModel):
    """AdamW with a warm-up and a cosine down to a floor."""

    learning_rate: float = Field(2e-3, gt=0, lt=1)
    final_share: float = Field(0.05, ge=0, le=1, description="of the learning rate, at the last step; 1: constant")
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(128, ge=1, description="questions per optimizer step, of all devices together")
    accumulate: int = Field(1, ge=1, description="passes that a device cuts its part of a batch into, to save memory")


class ObjectiveWeights(RecipeModel):
    """Weights of the loss terms; a term of weight 0 is not computed. See :mod:`slr_core.training.objectives`."""

    answer: float = Field(1.0, ge=0, description="cross-entropy of what is written after the loop")
    start: float = Field(0.0, ge=0, description="h_0 against the first token of the answer: the un-looped model")
    frontier: float = Field(0.0, ge=0, description="state t against the breadth-first frontier at distance t")
    chains: float = Field(0.0, ge=0, description="the frontier objective from other nodes of the same graph")
    steps: float = Field(0.0, ge=0, description="states against the tokens of their step, through the LM head (LOTUS)")
    thoughts: float = Field(0.0, ge=0, description="states against their step, through the latent decoder (SIM-CoT)")
    cot: float = Field(0.0, ge=0, description="cross-entropy of chain and answer in words, by the un-looped model")
    cot_states: float = Field(0.0, ge=0, description="states against those of the chain in words at the ends of steps")
    codi: float = Field(0.0, ge=0, description="all layers before the answer against those after the chain in words")
    teacher_states: float = Field(0.0, ge=0, description="projected states against those of a larger latent reasoner")
    teacher_logits: float = Field(0.0, ge=0, description="what is written against a larger latent reasoner's head")
    text: float = Field(0.0, ge=0, description="cross-entropy of the prompt's own tokens: pre-training on plain text")
    fixed_point: float = Field(0.0, ge=0, description="once the work is done another iteration changes nothing")
    contraction: float = Field(0.0, ge=0, description="no step is longer than a share of the one before it")
    shortcut: float = Field(0.0, ge=0, description="a shorter loop's state and answer against the full loop's")
    halting: float = Field(0.0, ge=0, description="the halting head against what more iterations would still gain")

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("at least one weight must be above 0")
        return self


class TrainingGuardConfig(RecipeModel):
    """When a run counts as diverged; it stops, and its last good checkpoint stays. A non-finite loss always does."""

    loss_factor: float = Field(10.0, gt=1, description="times the highest loss of the first 20 steps")
    gradient_factor: float = Field(1000.0, gt=1, description="times the highest gradient norm of the first 20 steps")
    patience: int = Field(5, ge=1, description="steps in a row above either")


class TrainConfig(RecipeModel):
    """A whole recipe."""

    output_dir: str
    seed: int = 0
    base: BaseConfig = BaseConfig()
    loop: LoopConfig | None = Field(
        None,
        description="a new loop around the base; None: that of the latent reasoner in base.from, else the defaults",
    )
    text: TextConfig | None = Field(None, description="None: as for loop")
    train: Literal["full", "adapters", "adapters_and_embeddings"] = Field(
        "full", description="adapters: the loop's own weights alone, the base stays as it is to the last bit"
    )
    teacher: str | None = Field(None, description="a latent reasoner's checkpoint, for the objectives teacher_*")
    optimizer: OptimizerConfig = OptimizerConfig()
    objectives: ObjectiveWeights = ObjectiveWeights()
    guard: TrainingGuardConfig = TrainingGuardConfig()
    thoughts_per_step: int = Field(
        1, ge=1, description="c: iterations (workspace block: positions) per step of a chain"
    )
    chains: int = Field(6, ge=0, description="other start nodes per graph for the objective `chains`")
    chain_length: int = Field(4, ge=1, description="their iterations, at most those of the stage")
    chain_spread: int = Field(
        0, ge=0, description="chains begin after 0 ... so many iterations: every adapter learns the same step"
    )
    contraction: float = Field(0.9, gt=0, le=1, description="the share that the objective `contraction` allows")
    max_iterations: int | None = Field(
        None, ge=0, description="caps every stage's iterations; 0 trains the control without the loop"
    )
    chain_of_thought: bool = Field(
        False, description="trains the method `cot`: the steps in words before the answer, in place of a loop"
    )
    save_steps: int = Field(500, ge=1)
    log_steps: int = Field(50, ge=1)
    bf16: bool = Field(False, description="automatic mixed precision in bfloat16")
    threads: int | None = Field(None, ge=1, description="torch threads; None: torch's own choice")
    stages: tuple[StageConfig, ...] = Field((), description="in order; or a curriculum, which is written out as stages")
    curriculum: CurriculumConfig | None = None

    @model_validator(mode="after")
    def _stages_or_curriculum(self) -> Self:
        if bool(self.stages) == (self.curriculum is not None):
            raise ValueError("give either stages or a curriculum")
        return self

    @model_validator(mode="after")
    def _objectives_suit_the_data(self) -> Self:
        terms, loops = self.objectives, self.max_iterations != 0
        if self.chain_of_thought and loops:
            raise ValueError("max_iterations must be 0 with chain_of_thought: it thinks in words or in a loop")
        if self.teacher is None and (terms.teacher_states or terms.teacher_logits):
            raise ValueError("objectives.teacher_states and teacher_logits need a teacher")
        sources = [source for stage in self.schedule for source in stage.data]
        if not all(source.graphs for source in sources) and (terms.frontier or (terms.chains and self.chains)):
            raise ValueError("objectives.frontier and chains need graphs: data of the task prosqa alone")
        if self.loop is not None or self.base.source is None:
            self.check(self.loop or LoopConfig())
        return self

    def check(self, loop: LoopConfig) -> None:
        """Refuse objectives that this loop could not follow.

        Raises:
            ConfigError: an objective needs another loop; it is named.
        """
        terms, loops = self.objectives, self.max_iterations != 0
        blind = loop.workspace != "append" or loop.timestep.noise_level or loop.projection.kind == "pause"
        prompt = loop.workspace == "prompt"
        aligned = [name for name in ("steps", "cot_states") if getattr(terms, name)]
        for refused, what in (
            (
                terms.chains and self.chains and loops and blind,
                "objectives.chains must be 0 unless loop.workspace is `append`, loop.timestep.noise_level false and "
                "loop.projection.kind not `pause`",
            ),
            (
                terms.start and loops and prompt,
                "objectives.start must be 0 in the workspace `prompt`, which never runs the plain prompt",
            ),
            (
                prompt and (terms.cot or terms.codi),
                "objectives.cot and codi must be 0 in the workspace `prompt`, which never runs the plain prompt",
            ),
            (
                prompt and aligned,
                f"objectives.{aligned[0] if aligned else ''} must be 0 in the workspace `prompt`: no position of it "
                "stands for a step",
            ),
            (terms.text and not prompt, "objectives.text needs the workspace `prompt`: the others loop after the text"),
            (terms.halting and not loop.halting_head, "objectives.halting needs loop.halting_head"),
            (
                terms.thoughts and loop.decoder.latent_decoder is None,
                "objectives.thoughts needs loop.decoder.latent_decoder",
            ),
        ):
            if refused:
                raise ConfigError(what)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> Self:
        """Read a recipe; each override is ``dotted.name=value`` with a YAML value.

        In a name, a number is the index of a list: ``stages.0.steps=20``.

        Raises:
            ConfigError: the file is not YAML, or a field is unknown or out of range.
            DataError: a file of questions without a task cannot be read.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of settings")
        for override in overrides:
            _apply(data, override)
        try:
            return validated(cls, data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def schedule(self) -> tuple[StageConfig, ...]:
        """The stages, whichever way they were given."""
        return self.stages if self.curriculum is None else self.curriculum.expand(self.thoughts_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.schedule)

    @property
    def writes_steps(self) -> bool:
        """Whether any step is put into words: those are followed by the mark ``#``."""
        terms = self.objectives
        in_words = self.chain_of_thought or bool(terms.cot or terms.cot_states or terms.codi)
        return in_words or any(stage.replaced != "all" for stage in self.schedule)

    def iterations(self, stage: StageConfig, rng: random.Random) -> int:
        """Loop length of a batch under the cap."""
        drawn = stage.iterations if isinstance(stage.iterations, int) else stage.iterations.draw(rng)
        return drawn if self.max_iterations is None else min(drawn, self.max_iterations)


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected dotted.name=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error})") from error
    *parents, last = name.split(".")
    group: Any = data
    for depth, parent in enumerate(parents):
        key = _key(group, parents[:depth], parent, override)
        if isinstance(group, dict) and group.get(key) is None:
            group[key] = {}
        group = group[key]
    group[_key(group, parents, last, override)] = parsed


def _key(group: Any, path: list[str], name: str, override: str) -> Any:
    """The key of ``name`` in the group of settings at ``path``: the name itself, or an index of a list."""
    where = ".".join(path)
    if isinstance(group, dict):
        return name
    if not isinstance(group, list):
        raise ConfigError(f"--set {override}: {where} is not a group of settings")
    if not name.isdecimal() or int(name) >= len(group):
        last = len(group) - 1
        indices = "it is empty" if last < 0 else "its only index is 0" if last == 0 else f"its indices are 0 to {last}"
        raise ConfigError(f"--set {override}: {where} is a list, {indices}; got {name}")
    return int(name)
