"""Requests and responses as JSON, strict: what is not described here is refused.

Booleans are no numbers, numbers are finite and in range, no field is unknown. The upper limits that an
operator sets (:mod:`slr_server.settings`) are checked where a request is planned (:mod:`slr_server.preprocess`).
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from slr_core.config import Criterion, Threshold
from slr_core.types import ExitReason, FinishReason, IterationRecord, Result, finite_or_none

DEFAULT_TOP_TOKENS = 5
_QUESTION = "Every yumpus is a rorpus. Every rorpus is a lempus. Alex is a yumpus. Is Alex a lempus or zhorpus?"
_GENERATE_EXAMPLES: list[JsonValue] = [
    {"prompt": _QUESTION},
    {
        "prompt": [_QUESTION, _QUESTION],
        "max_iterations": 8,
        "convergence": {"criterion": "relative_change", "threshold": 0.05, "patience": 2},
        "max_new_tokens": 32,
    },
]
_TRACE_EXAMPLES: list[JsonValue] = [{"prompt": _QUESTION, "top_tokens": 3}]


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("prompt_type", "must be a string or a list of strings")


def _not_minute(value: float) -> float:
    # Logits divided by less overflow, and a softmax of infinities has nothing to draw from.
    if 0 < value < 1e-3:
        raise PydanticCustomError("temperature_range", "must be 0 (greedy) or at least 0.001")
    return value


def _is_none(value: Any) -> bool:
    return value is None


def _finite_or_null(state: Tensor) -> list[list[float | None]]:
    return [[finite_or_none(value) for value in position] for position in state.tolist()]


Prompts = Annotated[
    list[str],
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Temperature = Annotated[float, Field(ge=0, le=10), AfterValidator(_not_minute)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
LoopSetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class StrictModel(BaseModel):
    """Something that is asked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Convergence(StrictModel):
    """When the loop stops by itself."""

    criterion: Criterion | None = Field(None, description="the distance that is compared to the threshold")
    threshold: Threshold | None = Field(
        None, description="stop below this; a criterion named without one takes its own default"
    )
    patience: int | None = Field(None, ge=1, le=64, description="iterations in a row below the threshold")


class GenerateRequest(StrictModel):
    """What ``POST /generate`` takes. What is left out takes the checkpoint's default."""

    model_config = ConfigDict(json_schema_extra={"examples": _GENERATE_EXAMPLES})

    prompt: Prompts = Field(min_length=1, description="a prompt, or several that are answered independently")
    max_iterations: int | None = Field(None, ge=0, description="most iterations of the loop; 0: the base model")
    min_iterations: int | None = Field(None, ge=0, description="iterations before the loop may stop by itself")
    convergence: Convergence | None = None
    max_new_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    temperature: Temperature | None = Field(None, description="0 (the default) is greedy")
    # Less would be 0 in the arithmetic of the sampler.
    top_p: float | None = Field(None, ge=1e-6, le=1, description="draw from the smallest set with this probability")
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="draw from so many tokens; 0: from all")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="sample i of a prompt draws with seed + i")
    stop: list[StopString] | None = Field(
        None, max_length=16, description="strings that end an answer; they are not part of it"
    )
    n: int | None = Field(None, ge=1, description="answers per prompt; 1 by default")
    loop_set: LoopSetName | None = Field(None, description="the loop set to run; the server's own by default")
    stream: bool | None = Field(None, description="tell of every iteration, token and result as server-sent events")


class TraceRequest(GenerateRequest):
    """What ``POST /trace`` takes: a generate request that is answered with every iteration's diagnostics."""

    model_config = ConfigDict(json_schema_extra={"examples": _TRACE_EXAMPLES})

    top_tokens: int | None = Field(
        None, ge=0, description=f"likely tokens to read per iteration; {DEFAULT_TOP_TOKENS} by default"
    )
    include_states: bool | None = Field(
        None, description="return every iteration's state, as far as the operator's limit on their size allows"
    )


class Frozen(BaseModel):
    """Something that is answered."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Usage(Frozen):
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    forward_passes: int = Field(description="passes of the model that this answer alone would have taken")


class Timings(Frozen):
    """Seconds in each stage."""

    queue_s: float
    prefill_s: float
    loop_s: float
    decode_s: float
    total_s: float


class GenerateResult(Frozen):
    """One answer."""

    index: int = Field(description="running number: all samples of the first prompt, then of the next")
    text: str
    finish_reason: FinishReason
    iterations: int = Field(description="iterations that the loop ran")
    exit_reason: ExitReason
    final_change: float | None = Field(description="relative change of the last iteration")
    budget_reduced: bool = Field(description="under pressure, the loop was allowed fewer iterations than asked for")
    usage: Usage
    timings: Timings

    @classmethod
    def of(cls, index: int, result: Result, reduced: bool) -> Self:
        """A result of the engine as JSON shows it."""
        return cls(**cls._fields(index, result, reduced))

    @classmethod
    def _fields(cls, index: int, result: Result, reduced: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "iterations": result.iterations,
            "exit_reason": result.exit_reason,
            "final_change": result.final_change,
            "budget_reduced": reduced,
            "usage": Usage(
                prompt_tokens=result.prompt_tokens,
                completion_tokens=result.completion_tokens,
                forward_passes=result.forward_passes,
            ),
            "timings": Timings(**vars(result.timings)),
        }


class TopToken(Frozen):
    """A token that the LM head reads from a state."""

    token: str
    prob: float


class Iteration(Frozen):
    """One iteration of the loop. ``null`` marks what is undefined or not finite."""

    t: int
    relative_change: float | None
    cosine: float | None
    norm: float | None
    contraction: float | None = Field(description="this step's length over the last one's; above 1 it expands")
    kl: float | None
    entropy: float | None
    adapter: str | None = Field(description="the loop adapter that was active")
    duration_s: float
    top_tokens: list[TopToken]
    thought: str | None = Field(
        None, exclude_if=_is_none, description="the state in words, where the model has a latent decoder"
    )
    state: list[list[float | None]] | None = Field(
        None, exclude_if=_is_none, description="with include_states: h_t, a list of numbers per workspace position"
    )

    @classmethod
    def of(cls, record: IterationRecord, states: Tensor | None = None, **more: Any) -> Self:
        """A record of the loop as JSON shows it; ``states`` ``[t + 1, W, d]`` are those of the whole loop."""
        tops = [TopToken(token=token, prob=prob) for token, prob in record.top_tokens]
        state = None if states is None else _finite_or_null(states[record.t])
        return cls(**{**vars(record), "top_tokens": tops, "state": state, **more})


class IterationData(Iteration):
    """In a stream: an iteration is done."""

    index: int = Field(description="of the answer")


class TokenData(Frozen):
    """In a stream: a token is written."""

    index: int = Field(description="of the answer")
    token_id: int
    text: str = Field(description="what may be shown beyond the last event; nothing while a character is incomplete")


class Stability(Frozen):
    """What the iterations together say."""

    contraction_rate: float | None
    oscillating: bool
    converged: bool


class TraceResult(GenerateResult):
    """One answer and how the loop came to it."""

    trace: list[Iteration]
    stability: Stability

    @classmethod
    def _fields(cls, index: int, result: Result, reduced: bool) -> dict[str, Any]:
        return {
            **super()._fields(index, result, reduced),
            "trace": [Iteration.of(record, result.states) for record in result.records],
            "stability": Stability(**vars(result.stability)),
        }


class Head(Frozen):
    """What every response begins with, and a stream ends with."""

    id: str
    model: str
    created: int = Field(description="seconds since 1970")


class GenerateResponse(Head):
    """Answers, prompt by prompt."""

    results: list[GenerateResult]


class TraceResponse(Head):
    """Answers with their traces, prompt by prompt."""

    results: list[TraceResult]


class LoadLoopSet(StrictModel):
    """What ``POST /admin/loop_sets`` takes."""

    name: LoopSetName = Field(description="a folder in the server's folder of loop sets; requests ask for it by this")


class LoopSetList(Frozen):
    """Loop sets by name."""

    loaded: list[str] = Field(description="those that requests can ask for; default is the server's own")
    available: list[str] = Field(description="those in the server's folder")


class Health(Frozen):
    """The body of a passed health check."""

    status: str


class ErrorDetail(Frozen):
    """What went wrong."""

    type: str = Field(description="the kind of error", examples=["invalid_request_error"])
    message: str
    param: str | None = Field(description="the field at fault, dotted, where it is one", examples=["prompt"])
    code: str = Field(description="the error, for programs", examples=["invalid_value"])


class ErrorResponse(Frozen):
    """The body of every error."""

    error: ErrorDetail
