"""Every setting of a latent reasoner, with its default and its meaning.

:class:`SLRConfig` is the content of ``slr_config.json``. Each part of the loop has its own settings, so that an
ablation is a config change: ``config.replace(loop={"residual": {"source": "none"}})``.
"""

# Over 400 lines: every setting of a checkpoint, its default and its meaning in one place.

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slr_core.errors import ConfigError
from slr_core.validation import validated

FORMAT_VERSION = 1

Criterion = Literal[
    "relative_change",
    "cosine",
    "kl",
    "entropy_change",
    "argmax_stable",
    "end_token",
    "learned",
    "survival",
    "fixed",
]
WorkspaceKind = Literal["append", "block", "prompt", "token"]

DEFAULT_THRESHOLDS: dict[str, float] = {
    "relative_change": 0.1,
    "cosine": 0.01,
    "kl": 0.01,
    "entropy_change": 0.01,
    "argmax_stable": 0.5,
    "end_token": 0.5,
    "learned": 0.5,
    "survival": 0.5,
    "fixed": 0.0,
}
"""Default threshold of each criterion. A criterion is a number that is small when the loop may end, most of them a
distance between two iterations: ``argmax_stable`` is 0 or 1, ``end_token`` is 1 minus the probability of a token,
``learned`` is 1 - p_halt, ``survival`` is the product of 1 - p_halt over the iterations so far, ``fixed`` never falls
below its threshold."""

READS_HALTING_HEAD: tuple[str, ...] = ("learned", "survival")
"""Criteria that need a halting head."""

TokenId = Annotated[int, Field(ge=0)]
Threshold = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ProjectionConfig(_Model):
    """``project``: the input of an iteration from the state before it."""

    kind: Literal["identity", "rms_match", "linear", "mlp", "expected_embedding", "pause"] = Field(
        "rms_match",
        description="identity: the state itself; rms_match: rescaled to the RMS of the embedding table; linear, mlp: "
        "learned maps; expected_embedding: the mean embedding of the tokens that the LM head reads at the state; "
        "pause: a learned vector in place of the state, a control without feedback for the workspace `append`",
    )
    top_tokens: int = Field(
        16,
        ge=1,
        le=1024,
        description="number of tokens in the mean of `expected_embedding`, the most likely ones; other kinds ignore it",
    )
    inner_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="width between the layers of `mlp`; None: the hidden size; other kinds ignore it",
    )
    norm: bool = Field(True, description="end `mlp` with a layer norm; other kinds ignore it")


class TimestepConfig(_Model):
    """The timestep embedding e_t."""

    kind: Literal["none", "sinusoidal", "learned"] = Field(
        "sinusoidal",
        description="none: no embedding; sinusoidal: sinusoidal features through an MLP; learned: one vector per "
        "trained iteration",
    )
    combine: Literal["add", "concat"] = Field(
        "add", description="add: add e_t to the projected state; concat: concatenate both and map to the hidden size"
    )
    noise_level: bool = Field(
        False, description="add to e_t a function of the last relative change (its logarithm through a small MLP)"
    )


Rank = Annotated[int, Field(ge=1, le=1024)]


class LoopLoraConfig(_Model):
    """The loop adapters L_t."""

    kind: Literal["per_iteration", "shared", "none"] = Field(
        "per_iteration",
        description="per_iteration: one adapter per trained iteration; shared: one for all; none: the plain base model",
    )
    covers: Literal["loop", "all"] = Field(
        "loop",
        description="loop: the adapters act in the iterations alone; all: the kind `shared` acts in every pass, those "
        "over prompt and answer included, also with 0 iterations (CODI)",
    )
    rank: Rank | tuple[Rank, ...] = Field(
        8, description="rank of the adapters: one number, or one per trained iteration"
    )
    alpha: float = Field(
        16.0, gt=0, le=1e4, description="their output is multiplied by alpha / rank: a higher rank needs a higher alpha"
    )
    target_modules: tuple[str, ...] | None = Field(
        None, description="names of the linear layers with an adapter; None: all linear layers except the LM head"
    )
    past_end: Literal["last", "cycle", "error"] = Field(
        "last",
        description="adapter and timestep embedding after the last trained iteration: last: those of the last; cycle: "
        "start again with the first; error: refuse such requests",
    )
    decode_rank: Rank | None = Field(
        None, description="rank of the adapter `decode`, active while the answer is decoded; None: no such adapter"
    )


class ResidualConfig(_Model):
    """``residual``: the next state from the output of an iteration and an earlier state s."""

    source: Literal["none", "initial", "previous"] = Field(
        "previous", description="the earlier state s: none, initial (h_0) or previous (h_{t-1})"
    )
    mix: Literal["add", "convex", "gated"] = Field(
        "gated",
        description="add: g + scale*s; convex: alpha*g + (1-alpha)*s; gated: convex with a learned alpha per channel",
    )
    scale: float = Field(0.1, ge=-10, le=10, description="scale of the mix `add`")
    alpha: float = Field(0.9, gt=0, le=1, description="alpha of the mix `convex`, and initial alpha of `gated`")
    norm: bool = Field(False, description="apply an RMS norm with a learned weight after the mix")

    @model_validator(mode="after")
    def _gate_can_start(self) -> Self:
        if self.mix == "gated" and self.alpha == 1:
            raise ValueError("alpha must be below 1 for the mix `gated`, whose initial value it is")
        return self


class ConvergenceConfig(_Model):
    """When the loop converges and stops."""

    criterion: Criterion = Field("relative_change", description="distance that is compared with the threshold")
    threshold: Threshold | None = Field(
        None, description="stop when the criterion falls below it; None: the criterion's default (DEFAULT_THRESHOLDS)"
    )
    patience: int = Field(1, ge=1, le=64, description="consecutive iterations below the threshold")
    end_token_id: TokenId | None = Field(
        None,
        description="token that ends a loop of the criterion `end_token`, which is 1 minus its probability; None: the "
        "criterion cannot be used. In `append` a chain of thoughts reads as it once: leave patience at 1",
    )

    @property
    def effective_threshold(self) -> float:
        """The threshold, or the criterion's default if it is ``None``."""
        return DEFAULT_THRESHOLDS[self.criterion] if self.threshold is None else self.threshold


class GuardConfig(_Model):
    """When a loop counts as diverged. A state that is not finite always does."""

    expanding_iterations: int = Field(
        3, ge=1, le=64, description="consecutive iterations with a contraction above 1 before the norm is checked"
    )
    norm_factor: float = Field(
        10.0,
        gt=1,
        le=1e6,
        description="then the loop has diverged if the norm of the state exceeds this multiple of |h_1|",
    )


class LatentDecoderConfig(_Model):
    """A small transformer that reads latent states by cross-attention and decodes them to text.

    It uses the base model's embeddings and LM head, so its size does not depend on the vocabulary.
    """

    hidden_size: int = Field(128, ge=8, le=8192, multiple_of=2, description="width of its layers")
    layers: int = Field(2, ge=1, le=48, description="transformer layers")
    heads: int = Field(4, ge=1, le=128, description="attention heads; their number divides the width")
    max_thought_tokens: int = Field(16, ge=1, le=1024, description="maximum tokens of a thought in a trace")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size must be a multiple of heads ({self.heads})")
        return self


class DecoderConfig(_Model):
    """What decodes states to text."""

    answers: Literal["lm_head", "latent_decoder"] = Field(
        "lm_head", description="decodes the answer after a loop: the base model with its LM head, or the latent decoder"
    )
    latent_decoder: LatentDecoderConfig | None = Field(
        None,
        description="latent decoder, which also adds a `thought` to every iteration of a trace; None: no such decoder",
    )

    @model_validator(mode="after")
    def _writer_exists(self) -> Self:
        if self.answers == "latent_decoder" and self.latent_decoder is None:
            raise ValueError("answers `latent_decoder` needs a latent_decoder; `latent_decoder: {}` uses its defaults")
        return self


class LoopConfig(_Model):
    """The loop: workspace, iterations, modules, exit and decoder."""

    workspace: WorkspaceKind = Field(
        "append",
        description="append: a chain of continuous thoughts; block: block_size latent positions after the prompt, "
        "refined in place; prompt: the prompt's own positions; token: every position, those of the answer included, is "
        "looped before the next one is written",
    )
    block_size: int = Field(
        8, ge=1, le=1024, description="positions of the workspace `block`; other workspaces ignore it"
    )
    trained_iterations: int = Field(
        6, ge=1, le=64, description="iterations with their own adapter and timestep embedding"
    )
    max_iterations: int = Field(6, ge=0, le=256, description="default maximum iterations of a request")
    min_iterations: int = Field(1, ge=0, le=256, description="default minimum iterations of a request")
    feedback: Literal["normed", "shifted", "raw"] = Field(
        "normed",
        description="what an iteration gets from the one before it. normed: each position its own state, after the "
        "final norm; shifted, in the workspace `block`: each position the state of the position before it, the first "
        "that of the last prompt position, and at t = 1 its input vector without projection; raw, in the workspace "
        "`token`: each position its own state before the final norm, which is then applied only where the head reads",
    )
    deeper_cache: Literal["copy", "shared"] = Field(
        "copy",
        description="in the workspace `token`: what later positions attend to at an iteration that an earlier one did "
        "not reach. copy: one key/value cache per iteration, where the keys and values of a position's last iteration "
        "stand in for those of deeper ones; shared: one cache for all iterations, which holds those of each position's "
        "last iteration; other workspaces ignore it",
    )
    projection: ProjectionConfig = ProjectionConfig()
    timestep: TimestepConfig = TimestepConfig()
    lora: LoopLoraConfig = LoopLoraConfig()
    residual: ResidualConfig = ResidualConfig()
    convergence: ConvergenceConfig = ConvergenceConfig()
    guard: GuardConfig = GuardConfig()
    halting_head: bool = Field(
        False,
        description="add a linear head that learns when to stop, for the criteria `learned` and `survival`",
    )
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.lora.past_end == "error" and self.max_iterations > self.trained_iterations:
            raise ValueError("max_iterations must be at most trained_iterations under lora.past_end `error`")
        if self.projection.kind == "pause" and self.workspace != "append":
            raise ValueError("projection.kind `pause` needs workspace `append`: in the others the input would be lost")
        if self.lora.covers == "all" and (self.lora.kind != "shared" or self.lora.decode_rank is not None):
            raise ValueError("lora.covers `all` needs lora.kind `shared` and no decode_rank")
        if self.feedback == "shifted" and self.workspace != "block":
            raise ValueError("feedback `shifted` needs workspace `block`")
        if isinstance(self.lora.rank, tuple):
            if self.lora.kind != "per_iteration":
                raise ValueError(f"lora.rank must be one number for lora.kind `{self.lora.kind}`")
            if len(self.lora.rank) != self.trained_iterations:
                raise ValueError(
                    f"lora.rank must be one number or {self.trained_iterations}, one per trained iteration, "
                    f"got {len(self.lora.rank)}"
                )
        if needed := self.missing_for(self.convergence.criterion):
            raise ValueError(f"convergence.criterion `{self.convergence.criterion}` needs {needed}")
        return self

    @model_validator(mode="after")
    def _workspace_token_fits(self) -> Self:
        if self.feedback == "raw" and self.workspace != "token":
            raise ValueError("feedback `raw` needs workspace `token`")
        if self.workspace != "token":
            return self
        for field, unsupported, why in (
            ("lora.decode_rank", self.lora.decode_rank is not None, "answers are written by the loop's own adapters"),
            ("timestep.noise_level", self.timestep.noise_level, "one change would have to stand for many positions"),
            ("decoder.answers", self.decoder.answers != "lm_head", "it must be `lm_head`, which reads every token"),
        ):
            if unsupported:
                raise ValueError(f"{field} is not supported by workspace `token`: {why}")
        return self

    def missing_for(self, criterion: Criterion) -> str | None:
        """What an exit criterion needs that this loop does not have; ``None``: nothing."""
        if criterion in READS_HALTING_HEAD and not self.halting_head:
            return "halting_head: true"
        if criterion == "end_token" and self.convergence.end_token_id is None:
            return "convergence.end_token_id"
        return None

    @property
    def feeds_positions(self) -> bool:
        """Whether what is fed back holds the base's learned position embeddings, which it must not get again.

        They are in a state before the final norm. A mean token embedding has none.
        """
        return self.feedback == "raw" and self.projection.kind != "expected_embedding"

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loop adapters, which are their folders in ``loops/``."""
        count = {"per_iteration": self.trained_iterations, "shared": 1, "none": 0}[self.lora.kind]
        return tuple(f"loop_{t:02d}" for t in range(1, count + 1))


# Every prompt is joined with these texts, and every new token is compared with the strings that end an answer.
_Text = Annotated[str, Field(max_length=65536)]
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_MAX_GROWTH = 64
"""Characters that the replacements in a prompt may make of one."""


class TextConfig(_Model):
    """Texts around a prompt and its answer, and when an answer ends."""

    prompt_strip: bool = Field(
        False, description="remove white space at both ends of every prompt of /generate and /trace"
    )
    prompt_replace: tuple[tuple[Annotated[str, Field(min_length=1)], str], ...] = Field(
        (),
        max_length=64,
        description="pairs (old, new): replace every old in a prompt of /generate and /trace by new, pair after pair",
    )
    prompt_prefix: _Text = Field("", description="text before every prompt of /generate and /trace")
    prompt_suffix: _Text = Field("", description="text after every prompt of /generate and /trace")
    answer_prefix: _Text = Field(
        "", description="text that is fed after the loop, before the answer; it is not part of the answer"
    )
    chat_template: str | None = Field(
        None, description="Jinja template for chats, run in a sandbox; None: the tokenizer's"
    )
    stop: tuple[_Stop, ...] = Field((), max_length=64, description="strings that end an answer and are not part of it")
    stop_token_ids: tuple[TokenId, ...] = Field((), description="token ids that end an answer, besides the end token")
    suppressed_token_ids: tuple[TokenId, ...] = Field((), description="token ids that are never chosen in an answer")
    max_new_tokens: int = Field(64, ge=1, le=65536, description="default token limit of an answer")

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        growth = 1
        for old, new in self.prompt_replace:
            growth *= max(1, -(-len(new) // len(old)))
        if growth > _MAX_GROWTH:
            raise ValueError(f"prompt_replace may make {growth} characters of one; at most {_MAX_GROWTH}")
        return self

    def wrap_prompt(self, prompt: str) -> str:
        """The text that is tokenized for a prompt: stripped, with replacements, between prefix and suffix."""
        prompt = prompt.strip() if self.prompt_strip else prompt
        for old, new in self.prompt_replace:
            prompt = prompt.replace(old, new)
        return self.prompt_prefix + prompt + self.prompt_suffix


class SLRConfig(_Model):
    """The content of ``slr_config.json``."""

    format_version: int = Field(
        FORMAT_VERSION, ge=1, le=FORMAT_VERSION, description="version of the checkpoint folder's format"
    )
    slr_version: str = Field("", description="version of the library that wrote the folder")
    base: str = Field(
        "base",
        description="the base model: a folder inside the checkpoint, a hub id, or, with base_sha256, a base that a "
        "package brings (`smollm2`)",
    )
    base_revision: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$")] | None = Field(
        None, description="with base_sha256: commit of the hub id (40 hexadecimal digits), or version of the package"
    )
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None,
        description="SHA-256 of the file with the base's weights, compared when the checkpoint is loaded; of several "
        "files, that of the output of `sha256sum *.safetensors`; None: a base inside the checkpoint, or any revision",
    )
    trained: bool = Field(
        True,
        description="whether the loop runs by default: it has been trained, or made of a trained model's own layers. "
        "Until then a request runs it only if it sets a loop parameter",
    )
    loop: LoopConfig = LoopConfig()
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _reference_is_exact(self) -> Self:
        if (self.base_revision is None) != (self.base_sha256 is None):
            raise ValueError("base_revision and base_sha256 must be set together")
        if self.base_sha256 is not None and self.base == "base":
            raise ValueError("base_sha256 needs a base outside of the checkpoint")
        return self

    @model_validator(mode="after")
    def _texts_fit_the_loop(self) -> Self:
        if self.text.answer_prefix and self.loop.workspace == "token":
            raise ValueError(
                "text.answer_prefix is not supported by workspace `token`, which loops every position alike: "
                "append it to text.prompt_suffix"
            )
        return self

    @property
    def default_iterations(self) -> int:
        """Maximum iterations of a request that sets no loop parameter: 0 until the loop is trained."""
        return self.loop.max_iterations if self.trained else 0

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
        """The JSON text that is written to a checkpoint."""
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
