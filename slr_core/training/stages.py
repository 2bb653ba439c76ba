"""The stages of a recipe: data, loop length, and the part of the chain of thought that is still written."""

from __future__ import annotations

import random
from math import exp, log
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core import tasks
from slr_core.tasks.base import OptionValue


class RecipeModel(BaseModel):
    """A group of recipe settings. Unknown names and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class DataConfig(RecipeModel):
    """Questions of one task, from a file, a split or the generator; or plain text."""

    task: str | None = Field(
        None, description="task, as for `--task`; not needed for a file whose fields identify it (prosqa)"
    )
    file: str | None = Field(None, description="a .jsonl or .jsonl.gz file")
    split: str | None = Field(None, description="a split of the public data set, loaded by `datasets`")
    generator_options: dict[str, OptionValue] = Field(
        {}, description="options of the task's generator; others keep their defaults"
    )
    questions: int | None = Field(
        None,
        ge=1,
        description="number of questions to generate and repeat, from the recipe's seed; None: new ones in every batch",
    )
    write_steps: bool = Field(
        False,
        description="make the steps a part of the question: plain text, which the objective `text` learns",
    )
    text: str | None = Field(None, description="a UTF-8 text file for pre-training, in place of a task's questions")
    characters: int = Field(512, ge=16, description="length of the pieces drawn from `text`")

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
            raise ValueError("generator_options apply to generated questions only")
        if self.questions is not None and not self.generated:
            raise ValueError("questions applies to generated questions only")
        if self.write_steps and self.text is not None:
            raise ValueError("write_steps applies to questions, which a text has none of")
        if self.text is None:
            task = tasks.resolve_task(self.task, None)
            if self.generated:
                task.generate(0, **self.generator_options)
        return self

    @property
    def generated(self) -> bool:
        """Whether the questions come from the task's generator."""
        return self.file is None and self.split is None and self.text is None

    @property
    def graphs(self) -> bool:
        """Whether every question has a graph, which the objectives `frontier` and `chains` need."""
        return self.task == "prosqa" and self.text is None and not self.write_steps


class SampledIterations(RecipeModel):
    """A loop length drawn for every batch: log-normal Poisson, as in Huginn (arXiv 2502.05171, section 3.3).

    ``1 + Poisson(exp(tau))``, clipped to ``least`` ... ``most``. ``tau`` is normal with standard deviation ``sigma``
    and such a mean that the draw's mean before clipping is ``mean``.
    """

    mean: float = Field(gt=1, le=64)
    sigma: float = Field(0.5, ge=0, le=2)
    least: int = Field(1, ge=1, le=64)
    most: int = Field(64, ge=1, le=64)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.least > self.most:
            raise ValueError("least must be at most `most`")
        return self

    def draw(self, rng: random.Random) -> int:
        """Draw a loop length."""
        rate = exp(rng.gauss(log(self.mean - 1) - self.sigma**2 / 2, self.sigma))
        # Knuth's method: the module `random` has no Poisson distribution.
        count, product = 0, rng.random()
        while count < self.most and product > exp(-rate):
            count, product = count + 1, product * rng.random()
        return min(self.most, max(self.least, 1 + count))


class StageConfig(RecipeModel):
    """Consecutive optimizer steps with the same data and loop length."""

    steps: int = Field(ge=1, description="optimizer steps")
    data: tuple[DataConfig, ...] = Field(min_length=1, description="sources; each batch takes one at random")
    iterations: Annotated[int, Field(ge=0, le=64)] | SampledIterations
    backprop: int | None = Field(None, ge=1, description="number of last iterations that get gradients; None: all")
    replaced: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        "all", description="number of leading steps that the loop replaces; the other steps are written"
    )
    removed_tokens: int | None = Field(
        None, ge=0, description="number of leading tokens of the chain to leave out, instead of whole steps (iCoT)"
    )
    mix: float = Field(
        0.0, ge=0, lt=1, description="share of questions trained as in a random earlier stage (Coconut's uniform_prob)"
    )
    exit: Literal["late", "own", "last"] = Field(
        "late",
        description="iteration after which the text is written. late: drawn from those after the last needed one; "
        "own: the last needed one, thoughts_per_step times the question's replaced steps (supervised `every`: once; "
        "`chain` in the workspace `append`: the tokens of the steps); "
        "last: the last one",
    )
    reset_optimizer: bool = Field(False, description="clear the moments of AdamW when the stage begins")
    without: tuple[str, ...] = Field((), description="objectives that this stage leaves out")

    @property
    def shortest(self) -> int:
        """Smallest number of iterations of a batch."""
        return self.iterations if isinstance(self.iterations, int) else self.iterations.least

    @property
    def longest(self) -> int:
        """Largest number of iterations of a batch."""
        return self.iterations if isinstance(self.iterations, int) else self.iterations.most


class CurriculumConfig(RecipeModel):
    """The multi-stage curriculum of Coconut (Hao et al., 2024, arXiv 2412.06769).

    Stage 0 writes the whole chain of thought. In stage k, ``thoughts_per_step`` iterations replace each of the first k
    steps. The last stage writes only the answer. With ``tokens_per_stage``, each stage leaves out that many more
    tokens of the chain instead of a step (iCoT: Deng et al., 2024, arXiv 2405.14838).
    """

    data: tuple[DataConfig, ...] = Field(min_length=1)
    stages: int = Field(ge=1, le=64, description="K: stages after stage 0; stage K loops for K steps")
    first_steps: int = Field(ge=0, description="optimizer steps of stage 0; 0: the base writes the chain already")
    stage_steps: int = Field(ge=1, description="optimizer steps of stages 1 ... K")
    last_steps: int = Field(ge=1, description="optimizer steps of the last stage, which writes only the answer")
    mix: float = Field(0.0, ge=0, lt=1, description="`mix` of every stage after the first")
    pad: bool = Field(True, description="all questions loop as long as the longest (exit `last`, else `own`)")
    gradual: bool = Field(True, description="with several thoughts per step, add them one at a time")
    tokens_per_stage: int | None = Field(None, ge=1, description="tokens left out per stage, instead of a step")
    reset_optimizer: bool = Field(False, description="clear the moments of AdamW at every change of stage")

    def expand(self, thoughts_per_step: int) -> tuple[StageConfig, ...]:
        """The stages of the curriculum, in order."""
        stages = [self._stage(0, 0, self.first_steps)] if self.first_steps else []
        for k in range(1, self.stages + 1):
            added = range(1, thoughts_per_step + 1) if self.gradual else [thoughts_per_step]
            share, rest = divmod(self.stage_steps, len(added))
            for j in added:
                steps = share + (rest if j == added[-1] else 0)
                if steps:
                    stages.append(self._stage(k, (k - 1) * thoughts_per_step + j, steps, reset=j == added[0]))
        stages.append(self._stage("all", self.stages * thoughts_per_step, self.last_steps))
        return tuple(stages)

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
