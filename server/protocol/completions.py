"""``/v1/completions``: bodies, and their translation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from slr_core.engine import Event, FinishedEvent, IterationEvent, TokenEvent
from slr_core.errors import RequestError
from slr_core.params import LoopParams
from slr_core.types import FinishReason, Request, Result, Tokens, TokenScore

from ..preprocess import FieldNames, GenerationJob, RawText
from ..sse import COMMENT, frame
from .openai import OPENAI_NAMES, LoopOptions, LoopResult, OpenAIRequest, Usage, check_empty, response_fields
from .schema import EXAMPLE_QUESTION, MAX_PROMPTS, Answer, OutputEvent, ResponseModel, is_none
from .vocabulary import Offsets, Vocabulary, token_id_label

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of max_tokens."""


# -- requests ----------------------------------------------------------------------------------------------


def _as_prompts(value: Any) -> Any:
    """A list of prompts, each a text or a tuple of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return value
        if isinstance(value[0], list) and len(value) > MAX_PROMPTS:
            raise PydanticCustomError("too_long", "must hold at most {limit} prompts", {"limit": MAX_PROMPTS})
        lists = value if isinstance(value[0], list) else [value]
        if all(isinstance(ids, list) and ids and all(_is_token_id(i) for i in ids) for ids in lists):
            return [tuple(ids) for ids in lists]
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
Prompts = Annotated[
    list[str | tuple[int, ...]],
    Field(max_length=MAX_PROMPTS, fail_fast=True),
    BeforeValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


class CompletionLoopOptions(LoopOptions):
    """The loop's settings: the object ``slr`` of a completion request."""

    loop_at: int | None = Field(
        None,
        ge=1,
        description="with echo: run the loop after this many tokens of the prompt, and score the rest as its answer; "
        "default: after the whole prompt, which the base model scores",
    )


class CompletionRequest(OpenAIRequest):
    """Body of ``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": EXAMPLE_QUESTION, "max_tokens": 8, "temperature": 0}]}
    )

    prompt: Prompts = Field(
        min_length=1, description="used as it is, without the checkpoint's prompt prefix and suffix"
    )
    max_tokens: int | None = Field(
        None, ge=0, description=f"maximum number of tokens; default: {DEFAULT_MAX_TOKENS}; 0 needs echo"
    )
    echo: bool | None = Field(None, description="begin each answer with its prompt")
    logprobs: int | None = Field(
        None, ge=0, description="return each token's log-probability and those of this many likely tokens"
    )
    best_of: int | None = Field(None, ge=1, description="must equal n")
    suffix: Annotated[str, AfterValidator(check_empty), WithJsonSchema({"type": "string", "maxLength": 0})] | None = (
        None
    )
    slr: CompletionLoopOptions | None = None


_NAMES = FieldNames({**OPENAI_NAMES, "max_new_tokens": "max_tokens", "loop_after": "slr.loop_at"})


def to_job(body: CompletionRequest) -> GenerationJob:
    """Translate a body.

    Raises:
        RequestError: its fields contradict each other.
    """
    n, echo, loop_at = body.n or 1, bool(body.echo), body.slr.loop_at if body.slr else None
    body.check_stream_options()
    if body.max_tokens == 0 and not echo:
        raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    if loop_at is not None and not echo:
        raise RequestError("slr.loop_at needs echo", param="slr.loop_at")
    if echo and body.stream and body.logprobs is not None:
        raise RequestError("logprobs with echo are not supported in a stream", param="stream")
    if body.best_of not in (None, n):
        raise RequestError(f"best_of must equal n ({n}): this server does not rank answers", param="best_of")
    with _NAMES.in_errors():
        loop, sampling = body.slr.params() if body.slr else LoopParams(), body.sampling()
    return GenerationJob(
        prompts=tuple(RawText(prompt) if isinstance(prompt, str) else Tokens(prompt) for prompt in body.prompt),
        n=n,
        loop=loop,
        sampling=sampling,
        max_new_tokens=None if body.max_tokens is None else max(1, body.max_tokens),
        default_max_new_tokens=DEFAULT_MAX_TOKENS,
        stop=tuple(body.stop or ()),
        logprobs=body.logprobs,
        score_prompt=echo and body.logprobs is not None,
        loop_after=loop_at,
        loop_set=body.model,
        stream=bool(body.stream),
        names=_NAMES,
    )


# -- responses ---------------------------------------------------------------------------------------------


class CompletionLogprobs(ResponseModel):
    """Log-probabilities of a completion's tokens, in order."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One completion, or in a stream a part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    slr: LoopResult | None = Field(None, exclude_if=is_none)


class Completion(ResponseModel):
    """Response of ``POST /v1/completions``, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionFormatter:
    """Formats the answers of one request.

    Args:
        body: the request's body.
        model: name of the loop adapter set that answers.
        vocabulary: its tokens.
    """

    error_event = None

    def __init__(self, body: CompletionRequest, model: str, vocabulary: Vocabulary) -> None:
        self.request, self.vocabulary = body, vocabulary
        self.n = body.n or 1
        self.silent = body.max_tokens == 0
        """Whether generated tokens are left out: the engine generates at least one."""
        self._fields = response_fields("cmpl", model)
        self._finished: dict[int, Answer] = {}
        self._streams: dict[int, _ChoiceStream] = {}

    def body(self, answers: Sequence[Answer]) -> Completion:
        """The response body. Decodes tokens, so call it in a thread if there are many."""
        self._finished = dict(enumerate(answers))
        choices = [self._choice(index, *answer) for index, answer in enumerate(answers)]
        return Completion(**self._fields, choices=choices, usage=self._usage())

    def frames(self, output: OutputEvent) -> Iterator[bytes]:
        """The chunks of a stream for one event; a comment for an iteration, so that the stream begins."""
        index, request, event, budget_reduced = output
        if index not in self._streams:
            self._streams[index] = _ChoiceStream(index, self, request)
        for choice in self._streams[index].parts(event, budget_reduced):
            yield frame(Completion(**self._fields, choices=[choice]), exclude=self.request.absent_in_chunks)
        if isinstance(event, IterationEvent):
            yield COMMENT
        elif isinstance(event, FinishedEvent):
            self._finished[index] = Answer(request, event.result, budget_reduced)

    def final_frames(self) -> Iterator[bytes]:
        """The usage, if it was asked for, and the end."""
        if self.request.wants_usage:
            yield frame(Completion(**self._fields, choices=[], usage=self._usage()))
        yield frame("[DONE]")

    def prompt_text(self, index: int, request: Request) -> str:
        """The prompt of an answer as text, with the tokens that follow the loop."""
        prompt = self.request.prompt[index // self.n]
        return prompt if isinstance(prompt, str) else self.vocabulary.text((*request.prompt_ids, *request.forced_ids))

    def logprobs(self, scores: Sequence[TokenScore], before: Sequence[int], offsets: Offsets) -> CompletionLogprobs:
        """Scores of consecutive tokens.

        Args:
            scores: of the tokens.
            before: the tokens that come before them in the text.
            offsets: advanced past them.
        """
        ids = [score.token_id for score in scores]
        pieces, history = self.vocabulary.token_bytes(ids, before), [*before, *ids]
        labels = [self.vocabulary.label(token_id, piece) for token_id, piece in zip(ids, pieces, strict=True)]
        tops = [
            None if score.logprob is None else self._top(score, label, history, len(before) + i)
            for i, (score, label) in enumerate(zip(scores, labels, strict=True))
        ]
        return CompletionLogprobs(
            tokens=labels,
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=tops if self.request.logprobs else None,
            text_offset=list(offsets.advance(pieces)),
        )

    def _top(self, score: TokenScore, label: str, history: Sequence[int], position: int) -> dict[str, float]:
        """Log-probabilities by label: of the likeliest tokens and of the chosen one, each under a label of its own."""
        labels = {label: score.token_id}
        top: dict[str, float] = {}
        for token_id, logprob in score.top:
            other = self.vocabulary.label(token_id, self.vocabulary.unchosen_bytes(token_id, history, position))
            if token_id == score.token_id:
                other = label
            elif labels.setdefault(other, token_id) != token_id:
                other = token_id_label(token_id)
            top[other] = logprob
        assert score.logprob is not None
        return {**top, label: score.logprob}

    def _choice(self, index: int, request: Request, result: Result, budget_reduced: bool) -> CompletionChoice:
        # Forced tokens are part of the prompt: they are returned with it, or not at all.
        text = "" if self.silent else result.text[len(self.vocabulary.text(request.forced_ids)) :]
        if self.request.echo:
            text = self.prompt_text(index, request) + text
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if self.request.logprobs is None else self._all_logprobs(index, request, result),
            finish_reason="length" if self.silent else result.finish_reason,
            slr=LoopResult.of(result, budget_reduced),
        )

    def _all_logprobs(self, index: int, request: Request, result: Result) -> CompletionLogprobs:
        """Of the prompt, if it was scored, and of the generated tokens."""
        forced = len(request.forced_ids)
        prompt = self.logprobs([*result.prompt_scores, *result.scores[:forced]], (), Offsets(0))
        offsets = Offsets(len(self.prompt_text(index, request)) if self.request.echo else 0)
        generated = [] if self.silent else result.scores[forced:]
        answer = self.logprobs(generated, request.forced_ids, offsets)
        tops = (
            None
            if prompt.top_logprobs is None or answer.top_logprobs is None
            else (prompt.top_logprobs + answer.top_logprobs)
        )
        return CompletionLogprobs(
            tokens=prompt.tokens + answer.tokens,
            token_logprobs=prompt.token_logprobs + answer.token_logprobs,
            top_logprobs=tops,
            text_offset=prompt.text_offset + answer.text_offset,
        )

    def _usage(self) -> Usage:
        prompt = completion = 0
        for index, (_, result, _) in self._finished.items():
            if index % self.n == 0:
                prompt += result.prompt_tokens
            if not self.silent:
                completion += result.completion_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class _ChoiceStream:
    """The stream of one choice.

    Attributes:
        hidden: characters of the generated text that are still to be left out: those of the forced tokens.
    """

    def __init__(self, index: int, formatter: CompletionFormatter, request: Request) -> None:
        self.index, self.formatter, self.request = index, formatter, request
        self.hidden = len(formatter.vocabulary.text(request.forced_ids))
        self._offsets, self._ids = Offsets(0), list[int]()
        self._started = False

    def parts(self, event: Event, budget_reduced: bool) -> Iterator[CompletionChoice]:
        """The parts of the choice for one event."""
        formatter = self.formatter
        if not self._started:
            self._started = True
            if formatter.request.echo:
                yield CompletionChoice(index=self.index, text=formatter.prompt_text(self.index, self.request))
        if isinstance(event, TokenEvent) and not formatter.silent:
            text = event.text[self.hidden :]
            self.hidden = max(0, self.hidden - len(event.text))
            if text or event.score:
                yield CompletionChoice(index=self.index, text=text, logprobs=self._logprobs(event.score))
        elif isinstance(event, FinishedEvent):
            reason = "length" if formatter.silent else event.result.finish_reason
            slr = LoopResult.of(event.result, budget_reduced)
            yield CompletionChoice(index=self.index, text="", finish_reason=reason, slr=slr)

    def _logprobs(self, score: TokenScore | None) -> CompletionLogprobs | None:
        if score is None:
            return None
        logprobs = self.formatter.logprobs([score], self._ids, self._offsets)
        self._ids.append(score.token_id)
        return logprobs
