"""``/generate``, ``/trace`` and the operator's endpoints: bodies, and their translation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.engine import FinishedEvent, IterationEvent, TokenEvent
from slr_core.params import SamplingParams
from slr_core.types import ExitReason, FinishReason, Result, Stability, Timings

from ..preprocess import DEFAULT_TOP_TOKENS, FieldNames, GenerationJob
from ..sse import frame
from .schema import (
    EXAMPLE_QUESTION,
    MAX_PROMPTS,
    Answer,
    Convergence,
    InitialNoise,
    MaxIterations,
    MinIterations,
    OutputEvent,
    RequestModel,
    ResponseModel,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    loop_names,
    loop_params,
)

_GENERATE_EXAMPLES: list[JsonValue] = [
    {"prompt": EXAMPLE_QUESTION},
    {
        "prompt": [EXAMPLE_QUESTION, EXAMPLE_QUESTION],
        "max_iterations": 8,
        "convergence": {"criterion": "relative_change", "threshold": 0.05, "patience": 2},
        "max_new_tokens": 32,
    },
]
_TRACE_EXAMPLES: list[JsonValue] = [{"prompt": EXAMPLE_QUESTION, "top_tokens": 3}]


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("prompt_type", "must be a string or a list of strings")


def _is_none(value: Any) -> bool:
    return value is None


Prompts = Annotated[
    list[str],
    Field(max_length=MAX_PROMPTS, fail_fast=True),
    BeforeValidator(_as_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
LoopSetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


# -- requests ----------------------------------------------------------------------------------------------


class GenerateRequest(RequestModel):
    """Body of ``POST /generate``. Fields that are left out take the checkpoint's defaults."""

    model_config = ConfigDict(json_schema_extra={"examples": _GENERATE_EXAMPLES})

    prompt: Prompts = Field(min_length=1, description="one prompt, or several that are answered independently")
    max_iterations: MaxIterations = None
    min_iterations: MinIterations = None
    convergence: Convergence | None = None
    initial_noise: InitialNoise | None = Field(
        None, description="noise in the initial state, to see whether the loop comes back from it"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="maximum number of tokens of an answer")
    temperature: Temperature | None = Field(None, description="sampling temperature; 0 (the default) is greedy")
    top_p: TopP | None = Field(None, description="sample from the smallest set of tokens with this probability")
    top_k: TopK | None = Field(None, description="sample from this many of the likeliest tokens; 0: from all")
    seed: Seed | None = Field(None, description="sampling seed; answer i of a prompt samples with seed + i")
    stop: Stop | None = Field(None, description="strings that end an answer; they are not part of it")
    n: int | None = Field(None, ge=1, description="answers per prompt; default: 1")
    loop_set: ModelName | None = Field(
        None, description="loop adapter set to run, as listed by /v1/models; default: the served model's own"
    )
    stream: bool | None = Field(None, description="send every iteration, token and result as server-sent events")


class TraceRequest(GenerateRequest):
    """Body of ``POST /trace``: a generate request whose answers include every iteration's measures."""

    model_config = ConfigDict(json_schema_extra={"examples": _TRACE_EXAMPLES})

    top_tokens: int | None = Field(
        None, ge=0, description=f"likely tokens to report per iteration; default: {DEFAULT_TOP_TOKENS}"
    )
    include_states: bool | None = Field(
        None, description="return every iteration's hidden state; the operator limits their size"
    )


_NAMES = FieldNames(loop_names())


def to_job(body: GenerateRequest) -> GenerationJob:
    """Translate a body.

    Raises:
        RequestError: its fields contradict each other.
    """
    with _NAMES.in_errors():
        loop = loop_params(body.max_iterations, body.min_iterations, body.convergence, body.initial_noise)
        sampling = SamplingParams(
            temperature=body.temperature or 0.0,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
        )
    return GenerationJob(
        prompts=tuple(body.prompt),
        n=body.n or 1,
        loop=loop,
        sampling=sampling,
        max_new_tokens=body.max_new_tokens,
        stop=tuple(body.stop or ()),
        trace=isinstance(body, TraceRequest),
        top_tokens=body.top_tokens if isinstance(body, TraceRequest) else None,
        include_states=isinstance(body, TraceRequest) and bool(body.include_states),
        loop_set=body.loop_set,
        stream=bool(body.stream),
        names=_NAMES,
    )


# -- responses ---------------------------------------------------------------------------------------------


class AnswerUsage(ResponseModel):
    """Cost of one answer."""

    prompt_tokens: int
    completion_tokens: int
    forward_passes: int = Field(description="forward passes that this answer alone would have taken")


class GenerateResult(ResponseModel):
    """One answer."""

    index: int = Field(description="position in the response: all samples of the first prompt, then of the next")
    text: str
    finish_reason: FinishReason
    iterations: int = Field(
        description="iterations that the loop ran; in the workspace `token`, before the first token"
    )
    exit_reason: ExitReason
    final_change: float | None = Field(description="relative change of the last iteration")
    iterations_per_token: list[int] | None = Field(
        None, exclude_if=_is_none, description="in the workspace `token`: iterations before each token of the answer"
    )
    budget_reduced: bool = Field(description="true: under load, the loop got fewer iterations than requested")
    usage: AnswerUsage
    timings: Timings = Field(description="seconds in each stage")


class TopToken(ResponseModel):
    """A likely token under the LM head."""

    token: str
    prob: float


class Iteration(ResponseModel):
    """One loop iteration. ``null`` marks values that are undefined or not finite."""

    t: int
    relative_change: float | None
    cosine: float | None
    norm: float | None
    contraction: float | None = Field(description="length of this step over that of the previous; above 1: expanding")
    kl: float | None
    entropy: float | None
    adapter: str | None = Field(description="the active loop adapter")
    duration_s: float
    top_tokens: list[TopToken]
    thought: str | None = Field(
        None, exclude_if=_is_none, description="text that the latent decoder reads from the state, if there is one"
    )
    state: list[list[float | None]] | None = Field(
        None, exclude_if=_is_none, description="with include_states: h_t, a list of numbers per workspace position"
    )


class IterationData(Iteration):
    """Stream event: an iteration is done."""

    index: int = Field(description="index of the answer")


class TokenData(ResponseModel):
    """Stream event: a token was generated."""

    index: int = Field(description="index of the answer")
    token_id: int
    text: str = Field(description="text added since the last event; empty while a character is incomplete")
    iterations: int | None = Field(
        None, exclude_if=_is_none, description="in the workspace `token`: iterations before this token"
    )


class TraceResult(GenerateResult):
    """One answer and the loop that led to it."""

    trace: list[Iteration]
    stability: Stability = Field(description="summary of the trace")


class ResponseHeader(ResponseModel):
    """First fields of every response; last event of every stream."""

    id: str
    model: str = Field(description="the loop adapter set that answered, as listed by /v1/models")
    created: int = Field(description="Unix time in seconds")


class GenerateResponse(ResponseHeader):
    """Answers, prompt by prompt."""

    results: list[GenerateResult]


class TraceResponse(ResponseHeader):
    """Answers with their traces, prompt by prompt."""

    results: list[TraceResult]


class GenerateFormatter:
    """Formats the answers of ``/generate``.

    Args:
        model: name of the loop adapter set that answers.
    """

    error_event = "error"
    result: ClassVar[type[GenerateResult]] = GenerateResult
    response: ClassVar[type[GenerateResponse | TraceResponse]] = GenerateResponse

    def __init__(self, model: str) -> None:
        self.header = ResponseHeader(id=f"slr-{uuid.uuid4().hex}", model=model, created=int(time.time()))

    def body(self, answers: Sequence[Answer]) -> GenerateResponse | TraceResponse:
        """The response body."""
        results = [self._result(index, answer.result, answer.budget_reduced) for index, answer in enumerate(answers)]
        return self.response(results=results, **vars(self.header))

    def frames(self, output: OutputEvent) -> Iterator[bytes]:
        """The events ``iteration``, ``token`` and ``result`` of a stream."""
        index = output.answer_index
        match output.event:
            case IterationEvent(record):
                yield frame(IterationData(index=index, **record.to_dict()), "iteration")
            case TokenEvent(token_id, text, _, iterations):
                yield frame(TokenData(index=index, token_id=token_id, text=text, iterations=iterations), "token")
            case FinishedEvent(result):
                yield frame(self._result(index, result, output.budget_reduced), "result")

    def final_frames(self) -> Iterator[bytes]:
        """The event ``done``."""
        yield frame(self.header, "done")

    def _result(self, index: int, result: Result, budget_reduced: bool) -> GenerateResult:
        return self.result(index=index, budget_reduced=budget_reduced, **self._fields(result))

    def _fields(self, result: Result) -> dict[str, Any]:
        return result.to_dict()


class TraceFormatter(GenerateFormatter):
    """Formats the answers of ``/trace``; argument as for :class:`GenerateFormatter`."""

    result = TraceResult
    response = TraceResponse

    def _fields(self, result: Result) -> dict[str, Any]:
        return result.to_dict(trace=True, states=True)


# -- operation ---------------------------------------------------------------------------------------------


class LoadLoopSet(RequestModel):
    """Body of ``POST /admin/loop_sets``."""

    name: LoopSetName = Field(description="a checkpoint folder in the server's --loop-sets folder")


class LoopSetList(ResponseModel):
    """Names of loop adapter sets."""

    loaded: list[str] = Field(description="sets that requests can name, the served model's own first")
    available: list[str] = Field(description="checkpoint folders in the server's --loop-sets folder")


class Readiness(ResponseModel):
    """The answer of ``/readyz``."""

    status: str
    tokenizer_lag_s: float = Field(description="age of the oldest request that is not tokenized yet")
    event_loop_lag_s: float = Field(description="longest delay of the event loop in the last 5 to 10 s")


class HealthStatus(ResponseModel):
    """Body of a health check that passes."""

    status: str


class VersionInfo(ResponseModel):
    """Versions of the server."""

    version: str


class ExamplePrompt(ResponseModel):
    """A prompt that the checkpoint answers well, from its ``examples.json``."""

    prompt: str
    answer: str | None = None


class RequestLimits(ResponseModel):
    """The operator's limits of a request."""

    max_iterations: int
    max_new_tokens: int
    max_top_tokens: int
    max_prompts: int
    max_state_values: int


class CheckpointInfo(ResponseModel):
    """The served checkpoint: the defaults of its loop, and example prompts."""

    model: str
    models: list[str] = Field(description="loaded loop adapter sets, the served model's own first")
    workspace: str
    positions: int | None = Field(description="positions that the loop refines; null: those of the prompt")
    hidden_size: int = Field(description="numbers in the state of a position")
    trained_iterations: int
    max_iterations: int = Field(description="default maximum of iterations")
    criterion: str = Field(description="default criterion")
    threshold: float = Field(description="default threshold of the default criterion")
    criteria: dict[str, float] = Field(description="criteria that requests can name, and their default thresholds")
    max_new_tokens: int = Field(description="default maximum number of tokens of an answer")
    limits: RequestLimits
    examples: list[ExamplePrompt]


class EndpointInfo(ResponseModel):
    """One endpoint."""

    method: str
    path: str
    summary: str


class Index(ResponseModel):
    """What this server is and which endpoints it has."""

    name: str
    version: str
    model: str
    docs: str = Field(description="path of the full documentation, with every field")
    endpoints: list[EndpointInfo]
