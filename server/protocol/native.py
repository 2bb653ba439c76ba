"""``/generate`` and ``/trace``: bodies, and their translation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, PlainValidator, StringConstraints, TypeAdapter, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.engine import FinishedEvent, IterationEvent, TokenEvent
from slr_core.params import SamplingParams
from slr_core.types import ExitReason, FinishReason, Result, Stability, Timings

from ..preprocess import DEFAULT_TOP_TOKENS, FieldNames, GenerationJob
from ..sse import frame
from .schema import (
    EXAMPLE_QUESTION,
    MAX_MESSAGES,
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
    is_none,
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


class PromptMessage(RequestModel):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


_STRICT = ConfigDict(strict=True)
_TEXTS = TypeAdapter(Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)], config=_STRICT)
_CHAT = TypeAdapter(Annotated[list[PromptMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)])


def _read_prompt(value: Any) -> list[str] | list[PromptMessage]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return _CHAT.validate_python(value) if value and isinstance(value[0], dict) else _TEXTS.validate_python(value)
    raise PydanticCustomError("prompt_type", "must be a string, a list of strings, or a list of messages")


Prompts = Annotated[
    list[str] | list[PromptMessage],
    PlainValidator(_read_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {
                    "type": "array",
                    "items": {"$ref": "#/components/schemas/PromptMessage"},
                    "minItems": 1,
                    "maxItems": MAX_MESSAGES,
                },
            ]
        }
    ),
]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


# -- requests ----------------------------------------------------------------------------------------------


class GenerateRequest(RequestModel):
    """Body of ``POST /generate``. Fields that are left out take the checkpoint's defaults."""

    model_config = ConfigDict(json_schema_extra={"examples": _GENERATE_EXAMPLES})

    prompt: Prompts = Field(
        description="a text, or several that are answered independently; or a chat, a list of messages, which the chat "
        "template formats"
    )
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
    trace_tokens: int | None = Field(
        None, ge=1, description="in the workspace `token`: number of tokens of an answer whose loops are returned"
    )


_NAMES = FieldNames({**loop_names(), "messages": "prompt"})


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
    texts = tuple(prompt for prompt in body.prompt if isinstance(prompt, str))
    chat = [message.model_dump() for message in body.prompt if isinstance(message, PromptMessage)]
    return GenerationJob(
        prompts=texts or (chat,),
        n=body.n or 1,
        loop=loop,
        sampling=sampling,
        max_new_tokens=body.max_new_tokens,
        stop=tuple(body.stop or ()),
        trace=isinstance(body, TraceRequest),
        top_tokens=body.top_tokens if isinstance(body, TraceRequest) else None,
        include_states=isinstance(body, TraceRequest) and bool(body.include_states),
        trace_tokens=(body.trace_tokens or 0) if isinstance(body, TraceRequest) else 0,
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
        None, exclude_if=is_none, description="in the workspace `token`: iterations before each token of the answer"
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
        None, exclude_if=is_none, description="text that the latent decoder reads from the state, if there is one"
    )
    state: list[list[float | None]] | None = Field(
        None, exclude_if=is_none, description="with include_states: h_t, a list of numbers per workspace position"
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
        None, exclude_if=is_none, description="in the workspace `token`: iterations before this token"
    )


class TraceResult(GenerateResult):
    """One answer and the loop that led to it."""

    trace: list[Iteration]
    stability: Stability = Field(description="summary of the trace")
    token_traces: list[list[Iteration]] | None = Field(
        None, exclude_if=is_none, description="with trace_tokens: the loops before the first tokens"
    )


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
