"""``/v1/chat/completions``: bodies, and their translation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.engine import FinishedEvent, IterationEvent, TokenEvent
from slr_core.errors import RequestError
from slr_core.params import LoopParams
from slr_core.types import FinishReason, TokenScore

from ..preprocess import FieldNames, GenerationJob
from ..sse import COMMENT, frame
from .openai import (
    IGNORED,
    OPENAI_NAMES,
    EmptyList,
    LoopOptions,
    LoopResult,
    OpenAIRequest,
    Usage,
    response_fields,
)
from .schema import (
    EXAMPLE_QUESTION,
    MAX_FIELDS,
    MAX_MESSAGES,
    Answer,
    OutputEvent,
    RequestModel,
    ResponseModel,
    check_size,
    is_none,
)
from .vocabulary import Vocabulary

_MIN_LOGPROB = -9999.0
"""OpenAI's log-probability of an impossible token."""


# -- requests ----------------------------------------------------------------------------------------------

_MAX_PARTS = 256
SmallObject = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Any],
    Field(max_length=MAX_FIELDS),
    BeforeValidator(check_size),
]


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    raise PydanticCustomError("content_type", "must be a string or a list of text parts")


Content = Annotated[
    list[TextPart],
    Field(max_length=_MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"$ref": "#/components/schemas/TextPart"}, "maxItems": _MAX_PARTS},
            ]
        }
    ),
]


class ChatMessage(RequestModel):
    """One turn of a chat. An answer of this server, or of OpenAI's, can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description=IGNORED)
    id: str | None = Field(None, description=IGNORED)
    reasoning_content: str | None = Field(None, description="accepted and ignored: not part of the prompt")
    provider_specific_fields: SmallObject | None = Field(None, description="accepted and ignored; sent by litellm")
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content)


class ResponseFormat(RequestModel):
    """The format of an answer: plain text."""

    type: Literal["text"]


class ChatRequest(OpenAIRequest):
    """Body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": EXAMPLE_QUESTION}], "max_tokens": 8}]}
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(
        None, ge=1, description="maximum number of tokens; default: the checkpoint's; older name of the next field"
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="maximum number of tokens")
    logprobs: bool | None = Field(None, description="return each token's log-probability")
    top_logprobs: int | None = Field(
        None, ge=0, description="return the log-probabilities of this many likely tokens as well; needs logprobs"
    )
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description=IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=IGNORED)
    reasoning_effort: Literal["medium"] | None = Field(
        None, description="only OpenAI's default, medium; slr.max_iterations sets the depth of the reasoning"
    )
    chat_template_kwargs: SmallObject | None = Field(
        None, description="variables for the chat template; those that it reads are not supported, others are ignored"
    )
    slr: LoopOptions | None = None


_MESSAGES = {"prompt": "messages", "logprobs": "top_logprobs", "template_options": "chat_template_kwargs"}
_ROLES = {"developer": "system"}  # the newer name; chat templates know the older


def to_job(body: ChatRequest) -> GenerationJob:
    """Translate a body.

    Raises:
        RequestError: its fields contradict each other.
    """
    limits = body.max_tokens, body.max_completion_tokens
    body.check_stream_options()
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs", param="top_logprobs")
    if None not in limits and limits[0] != limits[1]:
        raise RequestError("max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")
    max_new_tokens = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    names = FieldNames({**OPENAI_NAMES, **_MESSAGES, "max_new_tokens": max_new_tokens})
    with names.in_errors():
        loop, sampling = body.slr.params() if body.slr else LoopParams(), body.sampling()
    return GenerationJob(
        prompts=([{"role": _ROLES.get(m.role, m.role), "content": m.text} for m in body.messages],),
        n=body.n or 1,
        loop=loop,
        sampling=sampling,
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        stop=tuple(body.stop or ()),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        template_options=body.chat_template_kwargs or {},
        loop_set=body.model,
        stream=bool(body.stream),
        names=names,
    )


# -- responses ---------------------------------------------------------------------------------------------


class TopLogprob(ResponseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A generated token, its log-probability and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class AssistantMessage(ResponseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    slr: LoopResult


class ChatCompletion(ResponseModel):
    """Response of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(ResponseModel):
    """What a chunk adds to an answer; as in OpenAI's API, a field that adds nothing is left out."""

    role: Literal["assistant"] | None = Field(None, exclude_if=is_none)
    content: str | None = Field(None, exclude_if=is_none)


class ChunkChoice(ResponseModel):
    """A part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    slr: LoopResult | None = Field(None, exclude_if=is_none)


class ChatChunk(ResponseModel):
    """A chunk of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ChatFormatter:
    """Formats the answers of one request.

    Args:
        body: the request's body.
        model: name of the loop adapter set that answers.
        vocabulary: its tokens.
    """

    error_event = None

    def __init__(self, body: ChatRequest, model: str, vocabulary: Vocabulary) -> None:
        self.request, self.vocabulary = body, vocabulary
        self._fields = response_fields("chatcmpl", model)
        self._sent: dict[int, list[int]] = {}
        """Ids of the scored tokens that were sent, by answer."""
        self._finished: list[Answer] = []

    def body(self, answers: Sequence[Answer]) -> ChatCompletion:
        """The response body. Decodes tokens, so call it in a thread if there are many."""
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=result.text),
                logprobs=self._logprobs(result.scores, ()) if self.request.logprobs else None,
                finish_reason=result.finish_reason,
                slr=LoopResult.of(result, budget_reduced),
            )
            for index, (_, result, budget_reduced) in enumerate(answers)
        ]
        return ChatCompletion(**self._fields, choices=choices, usage=_usage(answers))

    def frames(self, output: OutputEvent) -> Iterator[bytes]:
        """The chunks of a stream for one event; a comment for an iteration, so that the stream begins."""
        for choice in self._parts(output):
            yield frame(ChatChunk(**self._fields, choices=[choice]), exclude=self.request.absent_in_chunks)
        if isinstance(output.event, IterationEvent):
            yield COMMENT
        elif isinstance(output.event, FinishedEvent):
            self._finished.append(Answer(output.request, output.event.result, output.budget_reduced))

    def final_frames(self) -> Iterator[bytes]:
        """The usage, if it was asked for, and the end."""
        if self.request.wants_usage:
            yield frame(ChatChunk(**self._fields, choices=[], usage=_usage(self._finished)))
        yield frame("[DONE]")

    def _parts(self, output: OutputEvent) -> Iterator[ChunkChoice]:
        index, event = output.answer_index, output.event
        if index not in self._sent:
            self._sent[index] = []
            yield ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
        if isinstance(event, TokenEvent) and (event.text or event.score):
            scores = None
            if event.score:
                scores = self._logprobs([event.score], self._sent[index])
                self._sent[index].append(event.token_id)
            yield ChunkChoice(index=index, delta=Delta(content=event.text), logprobs=scores)
        elif isinstance(event, FinishedEvent):
            reason, slr = event.result.finish_reason, LoopResult.of(event.result, output.budget_reduced)
            yield ChunkChoice(index=index, delta=Delta(), finish_reason=reason, slr=slr)

    def _logprobs(self, scores: Sequence[TokenScore], before: Sequence[int]) -> ChatLogprobs:
        """Scores of consecutive tokens; ``before`` are the tokens of the answer that come before them."""
        ids = [score.token_id for score in scores]
        pieces, history = self.vocabulary.token_bytes(ids, before), [*before, *ids]

        def entry(token_id: int, piece: bytes, logprob: float | None) -> TopLogprob:
            label = self.vocabulary.label(token_id, piece)
            return TopLogprob(token=label, logprob=_MIN_LOGPROB if logprob is None else logprob, bytes=list(piece))

        def top(i: int, score: TokenScore) -> list[TopLogprob]:
            position = len(before) + i
            return [
                entry(
                    other,
                    pieces[i] if other == ids[i] else self.vocabulary.unchosen_bytes(other, history, position),
                    logprob,
                )
                for other, logprob in score.top
            ]

        return ChatLogprobs(
            content=[
                ChatLogprob(**vars(entry(ids[i], pieces[i], score.logprob)), top_logprobs=top(i, score))
                for i, score in enumerate(scores)
            ]
        )


def _usage(answers: Sequence[Answer]) -> Usage:
    prompt = len(answers[0].request.prompt_ids)
    completion = sum(answer.result.completion_tokens for answer in answers)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
