"""Every setting of a latent reasoner, with its default and its meaning, in one place.

:class:`SLRConfig` is what ``slr_config.json`` holds. Each part of the loop is a small model of its
own, so that an ablation is a config change: ``config.replace(loop={"residual": {"source": "none"}})``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from slr_core.errors import ConfigError
from slr_core.suggest import did_you_mean, known_fields

M = TypeVar("M", bound=BaseModel)

FORMAT_VERSION = 1

Criterion = Literal["relative_change", "cosine", "kl", "entropy_change", "argmax_stable", "learned", "fixed"]
WorkspaceKind = Literal["append", "block", "prompt"]

DEFAULT_THRESHOLDS: dict[str, float] = {
    "relative_change": 0.1,
    "cosine": 0.01,
    "kl": 0.01,
    "entropy_change": 0.01,
    "argmax_stable": 0.5,
    "learned": 0.5,
    "fixed": 0.0,
}
"""The threshold of a criterion that is named without one. Every criterion is a distance that is
small when settled; ``argmax_stable`` is 0 or 1, ``learned`` is 1 - p_halt, ``fixed`` never falls below its
threshold."""

Threshold = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ProjectionConfig(_Model):
    """How a state becomes the next iteration's input."""

    kind: Literal["identity", "rms_match", "linear", "mlp", "pause"] = Field(
        "rms_match",
        description="rms_match rescales the state to the RMS of the embedding table; pause is a control for the "
        "workspace `append`: a learned vector whatever the state, so that no thought reaches the next",
    )


class TimestepConfig(_Model):
    """The timestep embedding e_t."""

    kind: Literal["none", "sinusoidal", "learned"] = Field(
        "sinusoidal", description="sinusoidal features through an MLP, one learned vector per iteration, or nothing"
    )
    combine: Literal["add", "concat"] = Field(
        "add", description="add e_t to the projected state, or concatenate both and map back to the hidden size"
    )
    noise_level: bool = Field(
        False, description="e_t also depends on the log of the last relative change, through a small MLP"
    )


Rank = Annotated[int, Field(ge=1, le=1024)]


class LoopLoraConfig(_Model):
    """The loop adapters L_t."""

    kind: Literal["per_iteration", "shared", "none"] = Field(
        "per_iteration", description="one adapter per iteration, one for all, or none"
    )
    rank: Rank | tuple[Rank, ...] = Field(8, description="rank of the adapters, or one rank per trained iteration")
    alpha: float = Field(16.0, gt=0, le=1e4, description="scale: the update is multiplied by alpha / rank")
    target_modules: tuple[str, ...] | None = Field(
        None, description="names of the linear layers that are adapted; None: every linear layer but the LM head"
    )
    past_end: Literal["last", "cycle", "error"] = Field(
        "last", description="adapter and timestep embedding past the last trained iteration"
    )
    decode_rank: Rank | None = Field(
        None, description="rank of the adapter `decode`, which writes the answer after a loop; None: the plain base"
    )


class ResidualConfig(_Model):
    """How an iteration's output and an earlier state make the next state."""

    source: Literal["none", "initial", "previous"] = Field("previous", description="h_0, or h_{t-1}, or nothing")
    mix: Literal["add", "convex", "gated"] = Field(
        "gated",
        description="add: g + scale*s; convex: alpha*g + (1-alpha)*s; gated: the same with a learned alpha per channel",
    )
    scale: float = Field(0.1, ge=-10, le=10, description="the factor of `add`")
    alpha: float = Field(0.9, gt=0, le=1, description="the share of g in `convex`, and where `gated` starts")
    norm: bool = Field(False, description="an RMS norm with a learned weight after the mix")

    @model_validator(mode="after")
    def _gate_can_start(self) -> Self:
        if self.mix == "gated" and self.alpha == 1:
            raise ValueError("alpha must be below 1 for the mix `gated`, which starts there")
        return self


class ConvergenceConfig(_Model):
    """When the loop stops by itself."""

    criterion: Criterion = Field("relative_change", description="the distance that is compared to the threshold")
    threshold: Threshold | None = Field(
        None, description="stop below this; None: the default of the criterion (DEFAULT_THRESHOLDS)"
    )
    patience: int = Field(1, ge=1, le=64, description="consecutive iterations below the threshold before stopping")

    @property
    def effective_threshold(self) -> float:
        """The threshold in force: the one given, or the criterion's default."""
        return DEFAULT_THRESHOLDS[self.criterion] if self.threshold is None else self.threshold


class GuardConfig(_Model):
    """When a loop counts as diverged. A non-finite state always does."""

    expanding_iterations: int = Field(
        3, ge=1, le=64, description="consecutive iterations with contraction above 1 before the norm is looked at"
    )
    norm_factor: float = Field(
        10.0, gt=1, le=1e6, description="diverged when, expanding for so long, the norm exceeds this multiple of |h_1|"
    )


class LatentDecoderConfig(_Model):
    """A small transformer that reads latent states by cross-attention and writes text.

    It shares the base model's embeddings and LM head, so that its size does not depend on the vocabulary.
    """

    hidden_size: int = Field(128, ge=8, le=8192, multiple_of=2, description="width of its layers")
    layers: int = Field(2, ge=1, le=48, description="transformer layers")
    heads: int = Field(4, ge=1, le=128, description="attention heads; they divide the width")
    max_thought_tokens: int = Field(16, ge=1, le=1024, description="longest thought of a trace, in tokens")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size must be a multiple of heads ({self.heads})")
        return self


class DecoderConfig(_Model):
    """Who puts states into words."""

    answers: Literal["lm_head", "latent_decoder"] = Field(
        "lm_head", description="who writes the answer after a loop: the base model's head, or the latent decoder"
    )
    latent_decoder: LatentDecoderConfig | None = Field(
        None, description="with one, every iteration of a trace has a `thought`; None: there is none"
    )

    @model_validator(mode="after")
    def _writer_exists(self) -> Self:
        if self.answers == "latent_decoder" and self.latent_decoder is None:
            raise ValueError("answers `latent_decoder` needs a latent_decoder; `latent_decoder: {}` takes the defaults")
        return self


class LoopConfig(_Model):
    """The loop: workspace, stabilisers, exit, decoder."""

    workspace: WorkspaceKind = Field(
        "append",
        description="append: a chain of continuous thoughts; block: block_size latent positions after the prompt, "
        "refined in place; prompt: the prompt's own positions",
    )
    block_size: int = Field(8, ge=1, le=1024, description="positions of the workspace `block`; the others ignore it")
    trained_iterations: int = Field(6, ge=1, le=64, description="iterations that have weights of their own")
    max_iterations: int = Field(6, ge=0, le=256, description="default T of a request")
    min_iterations: int = Field(1, ge=0, le=256, description="default minimum of a request")
    projection: ProjectionConfig = ProjectionConfig()
    timestep: TimestepConfig = TimestepConfig()
    lora: LoopLoraConfig = LoopLoraConfig()
    residual: ResidualConfig = ResidualConfig()
    convergence: ConvergenceConfig = ConvergenceConfig()
    guard: GuardConfig = GuardConfig()
    halting_head: bool = Field(False, description="a linear head that learns when to stop: the criterion `learned`")
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.lora.past_end == "error" and self.max_iterations > self.trained_iterations:
            raise ValueError("max_iterations must be at most trained_iterations under lora.past_end `error`")
        if self.projection.kind == "pause" and self.workspace != "append":
            raise ValueError("projection.kind `pause` needs workspace `append`: the others would lose their own input")
        if isinstance(self.lora.rank, tuple):
            if self.lora.kind != "per_iteration":
                raise ValueError(f"lora.rank must be one number for lora.kind `{self.lora.kind}`")
            if len(self.lora.rank) != self.trained_iterations:
                raise ValueError(
                    f"lora.rank must be one number or {self.trained_iterations}, one per trained iteration, "
                    f"got {len(self.lora.rank)}"
                )
        if self.convergence.criterion == "learned" and not self.halting_head:
            raise ValueError("convergence.criterion `learned` needs halting_head to be true")
        return self

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loop adapters: the folders below ``loops/``."""
        count = {"per_iteration": self.trained_iterations, "shared": 1, "none": 0}[self.lora.kind]
        return tuple(f"loop_{t:02d}" for t in range(1, count + 1))


TokenId = Annotated[int, Field(ge=0)]


class TextConfig(_Model):
    """How a prompt becomes text, and when an answer ends."""

    prompt_prefix: str = Field("", description="put before every prompt of /generate and /trace")
    prompt_suffix: str = Field("", description="put after every prompt of /generate and /trace")
    answer_prefix: str = Field(
        "", description="what every answer begins with: fed after the loop, not written and not part of the answer"
    )
    chat_template: str | None = Field(
        None, description="Jinja template of a chat, in place of the tokenizer's own; run in a sandbox"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="strings that end an answer; they are not part of it"
    )
    stop_token_ids: tuple[TokenId, ...] = Field((), description="tokens that end an answer, besides the end token")
    max_new_tokens: int = Field(64, ge=1, le=65536, description="default token limit of an answer")


class SLRConfig(_Model):
    """The whole of ``slr_config.json``."""

    format_version: int = Field(
        FORMAT_VERSION, ge=1, le=FORMAT_VERSION, description="version of the checkpoint folder's format"
    )
    slr_version: str = Field("", description="version of the library that wrote the folder")
    base: str = Field("base", description="the base model: a folder inside the checkpoint, or a hub id")
    loop: LoopConfig = LoopConfig()
    text: TextConfig = TextConfig()

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Validate parsed JSON.

        Raises:
            ConfigError: a field is unknown, missing or out of range; each is named with what it accepts.
        """
        return validated(cls, data)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read and validate a config file.

        Raises:
            ConfigError: the file is not JSON or a field is wrong.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable JSON file ({error})") from error
        return cls.from_dict(data)

    def to_json(self) -> str:
        """Canonical JSON text, as it is written to a checkpoint."""
        return self.model_dump_json(indent=2) + "\n"

    def replace(self, **changes: Any) -> Self:
        """A validated copy with nested fields changed: ``replace(loop={"max_iterations": 4})``."""
        return self.from_dict(_merge(self.model_dump(mode="json"), changes))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def validated(model: type[M], data: Any) -> M:
    """Validate ``data`` as JSON-like input for ``model``.

    Raises:
        ConfigError: one line per faulty field, with its dotted name.
    """
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(model, fault) for fault in error.errors())) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"config is not JSON-like: {error}") from error


def _fault(model: type[BaseModel], fault: ErrorDetails) -> str:
    location = fault["loc"]
    name = ".".join(map(str, location)) or "config"
    if fault["type"] != "extra_forbidden":
        return f"{name}: {fault['msg']}"
    return f"{name}: unknown field{did_you_mean(str(location[-1]), known_fields(model, location))}"
