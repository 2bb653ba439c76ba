"""Building blocks of all request and response bodies: strict models, shared field types, the error body.

Requests are strict: booleans are not numbers, numbers are finite and in range, unknown fields are errors. The
operator's upper limits (:mod:`slr_server.settings`) are checked in :mod:`slr_server.preprocess`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from slr_core.config import Criterion, Threshold
from slr_core.engine import Event
from slr_core.params import LoopParams
from slr_core.types import Request, Result

EXAMPLE_QUESTION = "Every yumpus is a rorpus. Every rorpus is a lempus. Alex is a yumpus. Is Alex a lempus or zhorpus?"


# -- limits ------------------------------------------------------------------------------------------------

MAX_FIELDS = 64
"""Fields of any object in a body."""
MAX_PROMPTS = 1 << 16
"""Prompts of any request; the operator's limit is lower."""
MAX_MESSAGES = 1024
"""Messages of a chat."""


def check_size(value: Any) -> Any:
    """Refuse a JSON object with more than :data:`MAX_FIELDS` fields, before each of them can be an error."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise PydanticCustomError("too_many_fields", "must have at most {limit} fields", {"limit": MAX_FIELDS})
    return value


# -- base classes ------------------------------------------------------------------------------------------


class RequestModel(BaseModel):
    """Base of everything in a request body.

    Validation has a bounded cost: a list of models stops at its first invalid item (``fail_fast``), and lists and
    mappings have a maximum size.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        return check_size(value)


class ResponseModel(BaseModel):
    """Base of everything in a response body."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_none(value: object) -> bool:
    """For ``exclude_if``: the field is left out of a body where it has no value."""
    return value is None


# -- shared request fields ---------------------------------------------------------------------------------


def _check_temperature(value: float) -> float:
    # Logits divided by a smaller number overflow, and a softmax of infinities cannot be sampled.
    if 0 < value < 1e-3:
        raise PydanticCustomError("temperature_range", "must be 0 (greedy) or at least 0.001")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": 256}
_MAX_STOP_STRINGS = 16

Temperature = Annotated[float, Field(ge=0, le=10), AfterValidator(_check_temperature)]
# A smaller top_p is 0 in the sampler's arithmetic.
TopP = Annotated[float, Field(ge=1e-6, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Stop = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
    Field(max_length=_MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": _MAX_STOP_STRINGS}]}),
]
"""One string or a list of strings."""


class Convergence(RequestModel):
    """When the loop stops before its maximum."""

    criterion: Criterion | None = Field(None, description="exit criterion: the distance compared to the threshold")
    threshold: Threshold | None = Field(
        None, description="stop below this value; default: that of the criterion if one is given"
    )
    patience: int | None = Field(None, ge=1, le=64, description="consecutive iterations below the threshold")


class InitialNoise(RequestModel):
    """Noise in the state from which the loop starts."""

    scale: float = Field(
        ge=0, le=100, description="standard deviation, as a multiple of the RMS of each position of the initial state"
    )
    seed: Seed | None = Field(None, description="seed of the noise; default: 0")


MaxIterations = Annotated[int | None, Field(ge=0, description="maximum loop iterations; 0: the base model, no loop")]
MinIterations = Annotated[int | None, Field(ge=0, description="minimum loop iterations before an early exit")]


def loop_params(
    max_iterations: int | None,
    min_iterations: int | None,
    convergence: Convergence | None,
    initial_noise: InitialNoise | None,
) -> LoopParams:
    """A body's loop settings as the engine takes them.

    Raises:
        RequestError: ``min_iterations`` is above ``max_iterations``.
    """
    convergence = convergence or Convergence()
    noise = initial_noise or InitialNoise(scale=0.0)
    return LoopParams(
        max_iterations=max_iterations,
        min_iterations=min_iterations,
        criterion=convergence.criterion,
        threshold=convergence.threshold,
        patience=convergence.patience,
        noise_scale=noise.scale,
        noise_seed=noise.seed or 0,
    )


def loop_names(prefix: str = "") -> Mapping[str, str]:
    """Names in the body of the fields of :class:`slr_core.params.LoopParams`, for :class:`FieldNames`."""
    direct = {name: f"{prefix}{name}" for name in ("max_iterations", "min_iterations")}
    noise = {f"noise_{name}": f"{prefix}initial_noise.{name}" for name in ("scale", "seed")}
    return direct | noise | {name: f"{prefix}convergence.{name}" for name in ("criterion", "threshold", "patience")}


# -- answers -----------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A finished answer."""

    request: Request
    result: Result
    budget_reduced: bool
    """Whether its iteration budget was reduced under load."""


class OutputEvent(NamedTuple):
    """An event of one answer while the engine works on it."""

    answer_index: int
    request: Request
    event: Event
    budget_reduced: bool
    """Whether its iteration budget was reduced under load."""


class Formatter(Protocol):
    """Turns answers into one endpoint's response; one instance serves one request."""

    @property
    def error_event(self) -> str | None:
        """Name of the stream event that reports an error; ``None``: the event has no name."""

    def body(self, answers: Sequence[Answer]) -> BaseModel:
        """The response body."""
        ...

    def frames(self, output: OutputEvent) -> Iterator[bytes]:
        """Frames of a stream for one event."""
        ...

    def final_frames(self) -> Iterator[bytes]:
        """Frames that end a stream."""
        ...


class ErrorDetail(ResponseModel):
    """What went wrong."""

    type: str = Field(description="kind of error", examples=["invalid_request_error"])
    message: str
    param: str | None = Field(description="dotted name of the field at fault, if any", examples=["prompt"])
    code: str = Field(description="machine-readable error code", examples=["invalid_value"])


class ErrorResponse(ResponseModel):
    """The body of every error."""

    error: ErrorDetail
