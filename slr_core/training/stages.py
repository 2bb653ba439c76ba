"""The stages of a recipe: what data, how long the loop, and how much of the chain of thought is left in words."""

from __future__ import annotations

import random
from math import exp, log
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core import tasks
from slr_core.tasks.base import OptionValue


class RecipeModel(BaseModel):
    """A group of settings: unknown names and loose types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class DataConfig(RecipeModel):
    """Questions of one task, generated unless a file or a split is named; or plain text."""

    task: str | None = Field(
        None, description="name of the task, as for `--task`; a file that tells its task needs none (prosqa)"
    )
    file: str | None = Field(None, description="a .jsonl or .jsonl.gz file")
    split: str | None = Field(None, description="a split of the public data set, by `datasets`")
    generator_options: dict[str, OptionValue] = Field(
        {}, description="of the task's generator; an option left out has the task's default"
    )
    text: str | None = Field(None, description="a UTF-8 text file for pre-training, in place of a task's questions")
    characters: int = Field(512, ge=16, description="length of the pieces that `text` is cut into")

    @model_validator(mode="before")
    @classmethod
    def _task_of_file(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in ("file", "split", "text"):
            # Without its value it would mean generated questions.
            if name in data and data[name] in (None, ""):
                raise ValueError(f"{name} has no value")
        if isinstance(data.get("file"), str) and data.get("task") is None:
            return {**data, "task": tasks.infer_task(data["file"]).name}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.file, self.split, self.text)) > 1:
            raise ValueError("give one of file, split and text, or none to generate questions")
        if self.generator_options and not self.generated:
            raise ValueError("generator_options are only for generated questions")
        if self.text is None:
            task = tasks.resolve_task(self.task, None)
            if self.generated:
                task.generate(0, **self.generator_options)
        return self

    @property
    def generated(self) -> bool:
        """Whether the task's generator makes the questions."""
        return self.file is None and self.split is None and self.text is None

    @property
    def graphs(self) -> bool:
        """Whether every question comes with its graph: what the objectives `frontier` and `chains` read."""
        return self.task == "prosqa" and self.text is None


class SampledIterations(RecipeModel):
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


class StageConfig(RecipeModel):
    """A stretch of training with one mix of data and one loop length."""

    steps: int = Field(ge=1, description="optimizer steps")
    data: tuple[DataConfig, ...] = Field(min_length=1, description="each batch draws one of these at random")
    iterations: Annotated[int, Field(ge=0, le=64)] | SampledIterations
    backprop: int | None = Field(
        None, ge=1, description="gradients reach the last so many iterations alone; None: all of them"
    )
    replaced: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        "all", description="leading steps of the chain of thought that the loop stands for; the others are written"
    )
    removed_tokens: int | None = Field(
        None, ge=0, description="leave out so many leading tokens of the chain instead of whole steps (iCoT)"
    )
    mix: float = Field(
        0.0, ge=0, lt=1, description="share of questions put as in a random earlier stage (Coconut's uniform_prob)"
    )
    exit: Literal["late", "own", "last"] = Field(
        "late",
        description="after which iteration the text is written. late: drawn between the end of the work and the last; "
        "own: after thoughts_per_step times the question's own replaced steps; last: padded to the maximum",
    )
    reset_optimizer: bool = Field(False, description="AdamW forgets its moments when the stage begins")

    @property
    def longest(self) -> int:
        """The most iterations that a batch can have."""
        return self.iterations if isinstance(self.iterations, int) else self.iterations.most


class CurriculumConfig(RecipeModel):
    """The multi-stage curriculum of Coconut (Hao et al., 2024, arXiv 2412.06769), written out as stages.

    Stage 0 writes the whole chain of thought; stage k lets the loop stand for its first k steps, with
    ``thoughts_per_step`` iterations each; the last one leaves no words but the answer. With ``tokens_per_stage``
    the chain gets shorter by so many tokens a stage instead (iCoT: Deng et al., 2024, arXiv 2405.14838).
    """

    data: tuple[DataConfig, ...] = Field(min_length=1)
    stages: int = Field(ge=1, le=64, description="K: stages after stage 0; the loop of the last has K steps' thoughts")
    first_steps: int = Field(ge=1, description="optimizer steps of stage 0")
    stage_steps: int = Field(ge=1, description="optimizer steps of stages 1 ... K")
    last_steps: int = Field(ge=1, description="optimizer steps of the end: no words but the answer")
    mix: float = Field(0.0, ge=0, lt=1, description="of every stage after the first, see StageConfig")
    pad: bool = Field(True, description="short chains get the loop of the longest (exit `last`, else `own`)")
    gradual: bool = Field(
        True, description="with several thoughts per step, a stage begins by adding one thought at a time"
    )
    tokens_per_stage: int | None = Field(None, ge=1, description="tokens that leave per stage, in place of a step")
    reset_optimizer: bool = Field(False, description="at every switch of stages")

    def expand(self, thoughts_per_step: int) -> tuple[StageConfig, ...]:
        """The stages."""
        made = [self._stage(0, 0, self.first_steps)]
        for k in range(1, self.stages + 1):
            added = range(1, thoughts_per_step + 1) if self.gradual else [thoughts_per_step]
            share, rest = divmod(self.stage_steps, len(added))
            for j in added:
                steps = share + (rest if j == added[-1] else 0)
                if steps:
                    made.append(self._stage(k, (k - 1) * thoughts_per_step + j, steps, reset=j == added[0]))
        made.append(self._stage("all", self.stages * thoughts_per_step, self.last_steps))
        return tuple(made)

    def _stage(self, k: int | Literal["all"], iterations: int, steps: int, *, reset: bool = True) -> StageConfig:
        by_token = self.tokens_per_stage is not None and k != "all"
        return StageConfig(
            steps=steps,
            data=self.data,
            iterations=iterations,
            replaced=k,
            removed_tokens=int(k) * (self.tokens_per_stage or 0) if by_token else None,
            mix=self.mix if k else 0.0,
            exit="last" if self.pad else "own",
            reset_optimizer=self.reset_optimizer and reset and k != 0,
        )
