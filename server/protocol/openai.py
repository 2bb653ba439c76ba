"""What both of OpenAI's endpoints share: request fields, the ``slr`` objects, usage, the list of models.

Fields that change nothing here are accepted and ignored. A value that would change the answer, and that this server
does not support, is refused by name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.errors import RequestError
from slr_core.params import LoopParams, SamplingParams
from slr_core.types import ExitReason, Result, Timings

from .schema import (
    MAX_FIELDS,
    Convergence,
    InitialNoise,
    MaxIterations,
    MinIterations,
    RequestModel,
    ResponseModel,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    check_size,
    loop_names,
    loop_params,
)

OPENAI_NAMES: Mapping[str, str] = {**loop_names("slr."), "loop_set": "model"}
"""Names in the bodies, for :class:`slr_server.preprocess.FieldNames`."""
IGNORED = "accepted and ignored"


# -- requests ----------------------------------------------------------------------------------------------


def _check_zero(value: float) -> float:
    if value != 0:
        raise PydanticCustomError("not_supported", "must be 0: this server does not support it")
    return value


def check_empty(value: Any) -> Any:
    """Accept only what is empty: a validator for what this server does not support."""
    if value:
        raise PydanticCustomError("not_supported", "must be empty: this server does not support it")
    return value


def _check_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_supported", "must be false: this server does not support it")
    return value


Zero = Annotated[float, AfterValidator(_check_zero), WithJsonSchema({"type": "number", "const": 0})]
AlwaysFalse = Annotated[bool, AfterValidator(_check_false), WithJsonSchema({"type": "boolean", "const": False})]
EmptyObject = Annotated[
    dict[str, Any], AfterValidator(check_empty), WithJsonSchema({"type": "object", "maxProperties": 0})
]
EmptyList = Annotated[list[Any], AfterValidator(check_empty), WithJsonSchema({"type": "array", "maxItems": 0})]


class LoopOptions(RequestModel):
    """The loop's settings: the object ``slr`` of a request."""

    max_iterations: MaxIterations = None
    min_iterations: MinIterations = None
    convergence: Convergence | None = None
    initial_noise: InitialNoise | None = None

    def params(self) -> LoopParams:
        """As the engine takes them.

        Raises:
            RequestError: ``min_iterations`` is above ``max_iterations``.
        """
        return loop_params(self.max_iterations, self.min_iterations, self.convergence, self.initial_noise)


class StreamOptions(RequestModel):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="send the token usage in a last chunk")
    continuous_usage_stats: AlwaysFalse | None = None
    include_obfuscation: bool | None = Field(None, description=IGNORED)


class OpenAIRequest(RequestModel):
    """Fields that both endpoints have."""

    model: str | None = Field(
        None, max_length=256, description="the served model or a loop adapter set; default: the served model"
    )
    temperature: Temperature | None = Field(None, description="sampling temperature; default: 1, as with OpenAI")
    top_p: TopP | None = Field(None, description="sample from the smallest set of tokens with this probability")
    top_k: TopK | None = Field(None, description="sample from this many of the likeliest tokens; 0: from all")
    n: int | None = Field(None, ge=1, description="answers per prompt; default: 1")
    stop: Stop | None = Field(None, description="strings that end an answer; they are not part of it")
    seed: Seed | None = Field(None, description="sampling seed; answer i of a prompt samples with seed + i")
    stream: bool | None = Field(None, description="send the answer in chunks, as server-sent events")
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: EmptyObject | None = None
    user: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    metadata: Annotated[dict[str, str], Field(max_length=MAX_FIELDS), BeforeValidator(check_size)] | None = Field(
        None, description=IGNORED
    )
    store: bool | None = Field(None, description="accepted and ignored: this server stores nothing")
    service_tier: Literal["auto", "default"] | None = Field(None, description=IGNORED)

    def sampling(self) -> SamplingParams:
        """How tokens are sampled, with OpenAI's defaults."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def absent_in_chunks(self) -> set[str]:
        """Fields that chunks leave out: the usage, unless it was asked for. It is then null up to the last chunk."""
        return set() if self.wants_usage else {"usage"}

    def check_stream_options(self) -> None:
        """Check that stream options come with a stream.

        Raises:
            RequestError: they do not.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream", param="stream_options")


# -- responses ---------------------------------------------------------------------------------------------


class LoopResult(ResponseModel):
    """What the loop did for a choice: its object ``slr``."""

    iterations: int
    iterations_per_token: list[int] | None = Field(
        None, exclude_if=lambda value: value is None, description="in the workspace `token`: before each token"
    )
    exit_reason: ExitReason
    final_change: float | None
    budget_reduced: bool
    forward_passes: int
    timings: Timings

    @classmethod
    def of(cls, result: Result, budget_reduced: bool) -> LoopResult:
        """From a result of the engine."""
        return cls(
            iterations=result.iterations,
            iterations_per_token=list(result.iterations_per_token) or None,
            exit_reason=result.exit_reason,
            final_change=result.final_change,
            budget_reduced=budget_reduced,
            forward_passes=result.forward_passes,
            timings=result.timings,
        )


class Usage(ResponseModel):
    """Tokens of all choices; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Model(ResponseModel):
    """A model that requests can name: the served model, or another loop adapter set on its base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["slr"] = "slr"


class ModelList(ResponseModel):
    """The models that requests can name."""

    object: Literal["list"] = "list"
    data: list[Model]


def response_fields(kind: str, model: str) -> dict[str, Any]:
    """The fields ``id``, ``created`` and ``model`` of a response."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
