"""OpenAI's request and response shapes, as strict as our own, with an ``slr`` object for what only a loop has.

What a field of theirs asks for that this server does not do is refused by name unless it asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.types import ExitReason, FinishReason, Result

from .native import _QUESTION, Convergence, Frozen, StopString, StrictModel, Temperature, Timings

Ids = tuple[int, ...]


def _prompts(value: Any) -> Any:
    """A list of prompts, each a text or a tuple of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return value
        lists = value if isinstance(value[0], list) else [value]
        if all(isinstance(ids, list) and ids and all(_is_id(i) for i in ids) for ids in lists):
            return [tuple(ids) for ids in lists]
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _zero(value: float) -> float:
    if value != 0:
        raise PydanticCustomError("not_supported", "must be 0: this server does not support it")
    return value


def _empty(value: Any) -> Any:
    if value:
        raise PydanticCustomError("not_supported", "must be empty: this server does not support it")
    return value


_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
Prompt = Annotated[
    list[str | Ids],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Stop = Annotated[
    list[StopString],
    BeforeValidator(_strings),
    Field(max_length=16),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 256},
                {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 256}, "maxItems": 16},
            ]
        }
    ),
]
Zero = Annotated[float, AfterValidator(_zero), WithJsonSchema({"type": "number", "const": 0})]
Nothing = Annotated[dict[str, Any], AfterValidator(_empty), WithJsonSchema({"type": "object", "maxProperties": 0})]
NoList = Annotated[list[Any], AfterValidator(_empty), WithJsonSchema({"type": "array", "maxItems": 0})]


class LoopOptions(StrictModel):
    """The loop's settings: the request's ``slr`` object."""

    max_iterations: int | None = Field(None, ge=0, description="most iterations of the loop; 0: the base model")
    min_iterations: int | None = Field(None, ge=0, description="iterations before the loop may stop by itself")
    convergence: Convergence | None = None


class ScoredLoopOptions(LoopOptions):
    """The same for completions, which can score a text on both sides of the loop."""

    loop_at: int | None = Field(
        None,
        ge=1,
        description="with echo: the loop runs after so many tokens of the prompt, and those that follow are scored "
        "as its answer; without it the whole prompt is scored by the base model, and the loop runs after it",
    )


class StreamOptions(StrictModel):
    """What a stream tells besides."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="taken and ignored")


class _Asked(StrictModel):
    model: str | None = Field(None, description="the served model, or a loop set; by default the served model")
    temperature: Temperature | None = Field(None, description="1 by default, as with OpenAI; 0 is greedy")
    top_p: float | None = Field(None, ge=1e-6, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="draw from so many tokens; 0: from all")
    n: int | None = Field(None, ge=1, description="answers per prompt")
    stop: Stop | None = None
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="sample i of a prompt draws with seed + i")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken and ignored")
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None


class CompletionRequest(_Asked):
    """What ``POST /v1/completions`` takes."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": _QUESTION, "max_tokens": 8, "temperature": 0}]}
    )

    prompt: Prompt = Field(min_length=1, description="raw: none of the checkpoint's texts are put around it")
    max_tokens: int | None = Field(None, ge=0, description="16 by default; 0 only with echo")
    echo: bool | None = Field(None, description="begin each answer with its prompt")
    logprobs: int | None = Field(None, ge=0, description="tell of each token's log-probability, and of so many others")
    best_of: int | None = Field(None, ge=1, description="must be n where it is given")
    suffix: Annotated[str, AfterValidator(_empty), WithJsonSchema({"type": "string", "maxLength": 0})] | None = None
    slr: ScoredLoopOptions | None = None


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[TextPart],
    BeforeValidator(_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}},
            ]
        }
    ),
]


class Message(StrictModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="taken and ignored")

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content)


class ResponseFormat(StrictModel):
    """Only plain text can be asked for."""

    type: Literal["text"]


class ChatRequest(_Asked):
    """What ``POST /v1/chat/completions`` takes."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 8}]}
    )

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="the checkpoint's default where neither is given")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="tell of each token's log-probability")
    top_logprobs: int | None = Field(None, ge=0, description="and of so many others; needs logprobs")
    response_format: ResponseFormat | None = None
    tools: NoList | None = None
    slr: LoopOptions | None = None


# -- responses ---------------------------------------------------------------------------------------------


class LoopResult(Frozen):
    """What the loop did for a choice: its ``slr`` object."""

    iterations: int
    exit_reason: ExitReason
    final_change: float | None
    budget_reduced: bool
    forward_passes: int
    timings: Timings

    @classmethod
    def of(cls, result: Result, reduced: bool) -> LoopResult:
        """Of a result of the engine."""
        return cls(
            iterations=result.iterations,
            exit_reason=result.exit_reason,
            final_change=result.final_change,
            budget_reduced=reduced,
            forward_passes=result.forward_passes,
            timings=Timings(**vars(result.timings)),
        )


class Usage(Frozen):
    """Tokens of all choices; a prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(Frozen):
    """Of a completion's tokens, place by place."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for a prompt's first token")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Choice(Frozen):
    """One completion, or in a stream a part of one."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    slr: LoopResult | None = None


class Completion(Frozen):
    """The answer of ``POST /v1/completions``, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class TopLogprob(Frozen):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A written token, its log-probability and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Frozen):
    """Of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(Frozen):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Frozen):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    slr: LoopResult


class ChatCompletion(Frozen):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Frozen):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Frozen):
    """A part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    slr: LoopResult | None = None


class ChatChunk(Frozen):
    """A chunk of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(Frozen):
    """A model that can be named in a request: the checkpoint, or a loop set on its base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["slr"] = "slr"


class ModelList(Frozen):
    """The models that can be named."""

    object: Literal["list"] = "list"
    data: list[Model]
