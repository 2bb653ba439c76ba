"""The recipe of ``slr train``: one YAML file, validated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from slr_core.config import LoopConfig, TextConfig
from slr_core.errors import ConfigError
from slr_core.training.base_config import BaseConfig
from slr_core.training.stages import CurriculumConfig, RecipeModel, StageConfig
from slr_core.validation import validated
from slr_core.yaml_text import parse_yaml


class OptimizerConfig(RecipeModel):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(2e-3, gt=0, lt=1)
    final_share: float = Field(
        0.05, ge=0, le=1, description="learning rate at the last step, as a share of the peak; 1: constant"
    )
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(128, ge=1, description="questions per optimizer step, over all devices")
    accumulate: int = Field(
        1, ge=1, description="gradient accumulation: forward passes per optimizer step on each device"
    )


TOKEN_OBJECTIVES = ("answer", "text", "teacher_logits", "halting")
"""Objectives that are defined in the workspace ``token``."""


class ObjectiveWeights(RecipeModel):
    """Weights of the loss terms; a term of weight 0 is not computed. See :mod:`slr_core.training.objectives`."""

    answer: float = Field(1.0, ge=0, description="cross-entropy of the tokens written after the loop")
    start: float = Field(0.0, ge=0, description="cross-entropy of the answer's first token at h_0: the un-looped model")
    frontier: float = Field(
        0.0, ge=0, description="KL from the breadth-first frontier at distance t to the head at h_t"
    )
    chains: float = Field(0.0, ge=0, description="the objective `frontier` from other start nodes of the same graph")
    steps: float = Field(
        0.0, ge=0, description="cross-entropy of a step's tokens at its states, by the LM head (LOTUS)"
    )
    thoughts: float = Field(0.0, ge=0, description="cross-entropy of a step's tokens by the latent decoder (SIM-CoT)")
    cot: float = Field(0.0, ge=0, description="cross-entropy of chain of thought and answer, by the un-looped model")
    cot_states: float = Field(
        0.0, ge=0, description="distance of states to those of the chain of thought at the ends of steps"
    )
    codi: float = Field(
        0.0, ge=0, description="distance of all layers before the answer to those after the chain of thought"
    )
    teacher_states: float = Field(0.0, ge=0, description="distance of projected states to those of the teacher")
    teacher_logits: float = Field(
        0.0, ge=0, description="KL from the teacher's next-token distributions after the loop"
    )
    text: float = Field(
        0.0,
        ge=0,
        description="cross-entropy of the prompt's tokens: pre-training on plain text; workspaces `prompt` and `token`",
    )
    fixed_point: float = Field(
        0.0, ge=0, description="relative change of states in iterations after the last needed one"
    )
    contraction: float = Field(0.0, ge=0, description="penalty on steps longer than a share of the step before")
    shortcut: float = Field(0.0, ge=0, description="distance of a shorter loop's state and answer to the full loop's")
    halting: float = Field(
        0.0, ge=0, description="cross-entropy of the halting head: does another iteration lower the loss?"
    )

    @model_validator(mode="after")
    def _has_an_objective(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("at least one weight must be above 0")
        return self


class TrainingGuardConfig(RecipeModel):
    """When a run counts as diverged and stops. A non-finite loss or gradient always counts."""

    loss_factor: float = Field(
        10.0,
        gt=1,
        description="limit, as a multiple of the highest loss of the first 20 steps, or of that of a uniform guess if "
        "that is higher",
    )
    gradient_factor: float = Field(
        1000.0,
        gt=1,
        description="limit, as a multiple of the highest gradient norm of the first 20 steps, or of max_grad_norm if "
        "that is higher",
    )
    patience: int = Field(5, ge=1, description="consecutive steps above a limit before the run stops")


class TrainConfig(RecipeModel):
    """A recipe."""

    output_dir: str
    seed: int = Field(0, ge=0, lt=2**32)
    base: BaseConfig = BaseConfig()
    loop: LoopConfig | None = Field(
        None,
        description="a new loop around the base; None: the loop of the latent reasoner in base.from, else the defaults",
    )
    text: TextConfig | None = Field(None, description="prompt and answer texts; None: as for loop")
    train: Literal["full", "adapters", "adapters_and_embeddings"] = Field(
        "full", description="parameters to train; adapters: the loop's weights only, the base stays unchanged"
    )
    teacher: str | None = Field(
        None,
        description="checkpoint of a latent reasoner, for the objectives teacher_*; for teacher_logits also a causal "
        "language model",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    objectives: ObjectiveWeights = ObjectiveWeights()
    guard: TrainingGuardConfig = TrainingGuardConfig()
    thoughts_per_step: int = Field(
        1, ge=1, description="c: iterations (workspace block: positions) per step of a chain"
    )
    supervised: Literal["last", "every", "chain"] = Field(
        "last",
        description="what the objective `steps` asks of which states. last: step k of its own positions of a block, or "
        "thoughts, after the last iteration (LOTUS); every: the same of a block after every iteration, step k from "
        "iteration k on. chain: position p of a block, or thought p, is fed token p of the chain as written and is "
        "asked for token p + 1 after every iteration, so that a model that writes the chain needs less training; "
        "the chain ends with the separator, at which the criterion `end_token` can end a loop of thoughts",
    )
    chains: int = Field(6, ge=0, description="other start nodes per graph for the objective `chains`")
    chain_length: int = Field(4, ge=1, description="iterations of these chains, at most those of the stage")
    chain_spread: int = Field(
        0,
        ge=0,
        description="the first iteration of chains is drawn from 1 ... chain_spread + 1, so that every adapter learns "
        "the same step",
    )
    contraction: float = Field(
        0.9, gt=0, le=1, description="share of the previous step's length that the objective `contraction` allows"
    )
    max_iterations: int | None = Field(
        None, ge=0, description="limit on every stage's iterations; 0 trains the control without a loop"
    )
    chain_of_thought: bool = Field(
        False, description="train the method `cot`: write the steps before the answer instead of looping"
    )
    held_out: int = Field(
        0,
        ge=0,
        description="different questions of every file or split that are kept out of training; the trained model "
        "answers them at the end, and they are written beside it",
    )
    save_steps: int = Field(500, ge=1)
    log_steps: int = Field(50, ge=1)
    bf16: bool | None = Field(
        None,
        description="automatic mixed precision in bfloat16; the weights that are trained stay in fp32. None: for bases "
        "of at least 50 million parameters, where the processor computes bfloat16 natively",
    )
    threads: int | None = Field(None, ge=1, description="torch threads; None: the default of torch")
    stages: tuple[StageConfig, ...] = Field((), description="the stages, in order; or give a curriculum")
    curriculum: CurriculumConfig | None = None

    @model_validator(mode="after")
    def _stages_or_curriculum(self) -> Self:
        if bool(self.stages) == (self.curriculum is not None):
            raise ValueError("give either stages or a curriculum")
        return self

    @model_validator(mode="after")
    def _check_objectives(self) -> Self:
        terms, loops = self.objectives, self.max_iterations != 0
        if self.chain_of_thought and loops:
            raise ValueError(
                "max_iterations must be 0 with chain_of_thought: a model writes its steps or loops, not both"
            )
        if self.teacher is None and (terms.teacher_states or terms.teacher_logits):
            raise ValueError("objectives.teacher_states and teacher_logits need a teacher")
        named = {name for stage in self.schedule for name in stage.without}
        if unknown := sorted(named - {name for name, weight in terms if weight}):
            raise ValueError(f"stages.without: {unknown[0]} is not an objective of this recipe")
        if any(not {name for name, weight in terms if weight} - set(stage.without) for stage in self.schedule):
            raise ValueError("stages.without leaves a stage no objective")
        sources = [source for stage in self.schedule for source in stage.data]
        if not all(source.graphs for source in sources) and (terms.frontier or (terms.chains and self.chains)):
            raise ValueError("objectives.frontier and chains need graphs: use only data of the task prosqa")
        if self.base.keep_adapters and self.loop is None:
            raise ValueError("base.keep_adapters needs loop: without it, a latent reasoner keeps all its weights")
        if self.base.is_pruned and self.loop is None:
            raise ValueError("loop is needed for a pruned base: a loop made for the whole base does not fit")
        if self.loop is not None or self.base.source is None:
            self.check(self.loop or LoopConfig(), None if self.text is None and self.base.source else self.text)
        return self

    def check(self, loop: LoopConfig, text: TextConfig | None) -> None:
        """Check that the objectives work with this loop and, if they are known, these texts.

        Raises:
            ConfigError: an objective needs another loop; the message names it.
        """
        terms, loops = self.objectives, self.max_iterations != 0
        idle = not loops or any(stage.shortest == 0 for stage in self.schedule)
        token = loop.workspace == "token"
        others = [name for name, weight in terms if weight and name not in TOKEN_OBJECTIVES]
        no_chains = loop.workspace != "append" or loop.timestep.noise_level or loop.projection.kind == "pause"
        prompt, chain = loop.workspace == "prompt", self.supervised == "chain"
        by_token = self.thinks_by_token(loop)
        aligned = [name for name in ("steps", "cot_states") if getattr(terms, name)]
        for is_wrong, message in (
            (
                self.train == "adapters" and loop.lora.covers != "all" and idle,
                "train `adapters` leaves 0 iterations nothing to train (max_iterations, stages.iterations, first_steps)"
                " unless loop.lora.covers is `all`",
            ),
            (
                terms.chains and self.chains and loops and no_chains,
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
                f"objectives.{(aligned or [''])[0]} must be 0 in the workspace `prompt`: no position is a step",
            ),
            (
                terms.text and not prompt and not token,
                "objectives.text needs the workspace `prompt` or `token`: other workspaces loop after the text",
            ),
            (
                token and loops and others,
                f"objectives.{others[0] if others else ''} is not supported by workspace `token`",
            ),
            (
                token and loops and loop.deeper_cache == "shared",
                "loop.deeper_cache must be `copy` in training: to answer with `shared`, set it in the trained "
                "checkpoint's slr_config.json",
            ),
            (
                self.supervised == "every" and loop.workspace != "block",
                "supervised must not be `every` but in the workspace `block`, whose positions stand for steps in every "
                "iteration",
            ),
            (
                self.supervised != "last" and not terms.steps and not (by_token and terms.cot),
                f"supervised `{self.supervised}` needs objectives.steps"
                + (" or cot" if loop.workspace == "append" else ""),
            ),
            (
                chain and any(s.replaced != "all" or s.removed_tokens is not None for s in self.schedule),
                "supervised `chain` needs stages that replace all steps, and no curriculum",
            ),
            (
                chain and (terms.cot_states or (terms.thoughts and by_token)),
                "objectives.cot_states and thoughts must be 0 with supervised `chain`: thoughts are tokens, not steps",
            ),
            (chain and self.thoughts_per_step != 1, "thoughts_per_step must be 1 with supervised `chain`"),
            (
                by_token and terms.answer and text is not None and not text.answer_prefix,
                "supervised `chain` in the workspace `append` needs text.answer_prefix: the last thought reads as the "
                "separator, so that the answer needs a token of its own to begin after",
            ),
            (
                chain
                and loop.feedback != "shifted"
                and (loop.workspace, loop.projection.kind) != ("append", "expected_embedding"),
                "supervised must not be `chain` but in the workspaces `block` with feedback `shifted` and `append` "
                "with the projection `expected_embedding`: others are not fed what the ones before them read as",
            ),
            (
                loops and loop.lora.past_end == "error" and self.longest > loop.trained_iterations,
                f"stages.iterations must be at most loop.trained_iterations, {loop.trained_iterations}, with "
                f"loop.lora.past_end `error`; got {self.longest}",
            ),
            (terms.halting and not loop.halting_head, "objectives.halting needs loop.halting_head"),
            (
                terms.thoughts and loop.decoder.latent_decoder is None,
                "objectives.thoughts needs loop.decoder.latent_decoder",
            ),
        ):
            if is_wrong:
                raise ConfigError(message)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> Self:
        """Read a recipe; each override is ``dotted.name=value`` with a YAML value.

        In a name, a number is the index of a list: ``stages.0.steps=20``.

        Raises:
            ConfigError: the file cannot be read as YAML, or a field is unknown or out of range.
            DataError: a file of questions without a task cannot be read.
        """
        try:
            data = parse_yaml(Path(path).read_text(encoding="utf-8"))
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
        """The stages: those given, or those of the curriculum."""
        return self.stages if self.curriculum is None else self.curriculum.expand(self.thoughts_per_step)

    @property
    def iterations_per_step(self) -> int:
        """Iterations that a step of a chain needs: c thoughts, but one where a block's positions are all supervised."""
        return self.thoughts_per_step if self.supervised == "last" else 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.schedule)

    def shortened(self, steps: int) -> Self:
        """The recipe with its first ``steps`` optimizer steps alone; the learning rate falls within them."""
        stages, left = [], steps
        for stage in self.schedule:
            if left > 0:
                stages.append(stage.model_copy(update={"steps": min(left, stage.steps)}))
            left -= stage.steps
        return self.model_copy(update={"stages": tuple(stages), "curriculum": None})

    @property
    def writes_steps(self) -> bool:
        """Whether any target text contains steps, which are followed by the separator ``#``."""
        return self.chain_of_thought or self.reads_chain or any(stage.replaced != "all" for stage in self.schedule)

    def thinks_by_token(self, loop: LoopConfig) -> bool:
        """Whether each thought of a loop stands for a token of the chain."""
        return self.supervised == "chain" and loop.workspace == "append"

    @property
    def reads_chain(self) -> bool:
        """Whether an objective reads the whole chain, beside the loop that replaces it."""
        terms = self.objectives
        return bool(terms.cot or terms.cot_states or terms.codi or (terms.steps and self.supervised == "chain"))

    @property
    def longest(self) -> int:
        """Largest number of iterations of any batch."""
        most = max(stage.longest for stage in self.schedule)
        return most if self.max_iterations is None else min(most, self.max_iterations)

    def iterations(self, stage: StageConfig, rng: random.Random) -> int:
        """Draw the loop length of a batch, at most ``max_iterations``."""
        drawn = stage.iterations if isinstance(stage.iterations, int) else stage.iterations.draw(rng)
        return drawn if self.max_iterations is None else min(drawn, self.max_iterations)


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected dotted.name=value")
    try:
        parsed = parse_yaml(value)
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
