"""``/v1/completions``: from its body to the engine's requests, and from their results to its choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from slr_core.engine import Event, FinishedEvent, TokenEvent
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import SamplingParams
from slr_core.types import Request, Result, Tokens, TokenScore

from ..preprocess import check_count, check_max, check_prompt, resolve, samples, with_prompt_index
from ..service import GenerationJob
from ..settings import Settings
from .openai import Choice, CompletionRequest, Logprobs, LoopResult, Usage

DEFAULT_TOKENS = 16
"""OpenAI's default of max_tokens."""


class Vocabulary:
    """Token ids as text, remembered."""

    def __init__(self, reasoner: LatentReasoner) -> None:
        self.token = cache(lambda token_id: str(reasoner.tokenizer.decode([token_id])))
        self._tokenizer = reasoner.tokenizer

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as one text, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


@dataclass(frozen=True)
class _Prompt:
    text: str
    ids: tuple[int, ...]
    forced: tuple[int, ...]
    """Those of its tokens that stand after the loop."""
    forced_chars: int


class Completions:
    """One body, and what its answers are made of.

    Raises:
        RequestError: a field is above its limit, or contradicts another.
    """

    def __init__(self, body: CompletionRequest, settings: Settings) -> None:
        self.body, self.settings = body, settings
        self.n = body.n or 1
        self.echo = bool(body.echo)
        self.loop_at = body.slr.loop_at if body.slr else None
        self._prompts: list[_Prompt] = []
        self._vocabulary: Vocabulary | None = None
        check_count(len(body.prompt), body.n, settings)
        check_shared(body, settings)
        check_max("max_tokens", body.max_tokens, settings.max_new_tokens)
        check_max("logprobs", body.logprobs, settings.max_top_tokens)
        if body.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
        if self.loop_at is not None and not self.echo:
            raise RequestError("slr.loop_at needs echo", param="slr.loop_at")
        if self.echo and body.stream and body.logprobs is not None:
            raise RequestError("logprobs with echo are not streamed: leave out stream", param="stream")
        if body.best_of not in (None, self.n):
            raise RequestError(f"best_of must be n ({self.n}): this server does not rank answers", param="best_of")

    def ask(self, loop_set: str | None) -> GenerationJob:
        """What it asks of the engine."""
        return GenerationJob(len(self.body.prompt) * self.n, self._plan, loop_set, bool(self.body.stream))

    def _plan(self, reasoner: LatentReasoner, limit: int) -> list[Request]:
        body, settings = self.body, self.settings
        self._vocabulary = Vocabulary(reasoner)
        loop = resolve(reasoner.config.loop, body.slr, settings.max_iterations, "slr.")
        requests = []
        for index, given in enumerate(body.prompt):
            try:
                ids = _encode(reasoner, given) if isinstance(given, str) else given
                check_prompt(ids, settings)
                before = len(ids) if self.loop_at is None else self.loop_at
                if before > len(ids):
                    raise RequestError(
                        f"slr.loop_at must be at most {len(ids)}, the prompt's tokens, got {before}",
                        param="slr.loop_at",
                    )
                request = prepare(
                    reasoner,
                    Tokens(ids[:before]),
                    loop,
                    max_new_tokens=max(1, body.max_tokens) if body.max_tokens is not None else None,
                    sampling=sampling(body),
                    stop=body.stop or (),
                    logprobs=body.logprobs,
                    score_prompt=self.echo and body.logprobs is not None,
                    forced_ids=tuple(ids[before:]),
                    limit=limit,
                )
            except RequestError as error:
                raise with_prompt_index(rename_param(error, body), index, len(body.prompt)) from error
            if body.max_tokens is None:
                request = replace(request, max_new_tokens=min(request.max_new_tokens, DEFAULT_TOKENS))
            text = given if isinstance(given, str) else self._vocabulary.text(ids)
            self._prompts.append(_Prompt(text, ids, request.forced_ids, len(self._vocabulary.text(request.forced_ids))))
            requests += samples(request, body.n)
        return requests

    # -- answers ------------------------------------------------------------------------------------

    def choices(self, results: Sequence[tuple[Result, bool]]) -> list[Choice]:
        """The choices of a whole answer; decodes, so it belongs in a thread."""
        return [self._choice(index, result, reduced) for index, (result, reduced) in enumerate(results)]

    def _choice(self, index: int, result: Result, reduced: bool) -> Choice:
        prompt = self._prompts[index // self.n]
        text = "" if self.body.max_tokens == 0 else result.text[prompt.forced_chars :]
        shown = (prompt.text if self.echo else "") + text
        scores: list[TokenScore] = []
        if self.body.logprobs is not None:
            own = result.scores[: len(prompt.forced)] if self.body.max_tokens == 0 else result.scores
            scores = [*result.prompt_scores, *own]
        return Choice(
            index=index,
            text=shown,
            logprobs=self._logprobs(scores, 0) if self.body.logprobs is not None else None,
            finish_reason="length" if self.body.max_tokens == 0 else result.finish_reason,
            slr=LoopResult.of(result, reduced),
        )

    def _logprobs(self, scores: Sequence[TokenScore], offset: int) -> Logprobs:
        assert self._vocabulary is not None
        token = self._vocabulary.token
        tokens, offsets = [token(score.token_id) for score in scores], []
        for each in tokens:
            offsets.append(offset)
            offset += len(each)
        tops: list[dict[str, float] | None] = []
        for score in scores:
            if score.logprob is None:
                tops.append(None)
                continue
            # Different tokens may read the same: the likelier one counts. The token itself is among them.
            top: dict[str, float] = {}
            for other, logprob in (*score.top, (score.token_id, score.logprob)):
                top.setdefault(token(other), logprob)
            tops.append(top)
        return Logprobs(
            tokens=tokens,
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=tops if self.body.logprobs else None,
            text_offset=offsets,
        )

    def usage(self, results: Sequence[Result]) -> Usage:
        """Of all choices, in any order."""
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        written = 0
        if self.body.max_tokens != 0:
            forced = sum(len(prompt.forced) for prompt in self._prompts) * self.n
            written = sum(result.completion_tokens for result in results) - forced
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)

    def parts(self) -> StreamedChoices:
        """The same piece by piece, for a stream."""
        return StreamedChoices(self)


class StreamedChoices:
    """The choices of a stream, as they grow."""

    def __init__(self, whole: Completions) -> None:
        self.whole = whole
        self._begun: set[int] = set()
        self._hidden: dict[int, int] = {}
        self._offset: dict[int, int] = {}

    def of(self, index: int, event: Event, reduced: bool) -> Iterator[Choice]:
        """What an event adds to a choice."""
        whole = self.whole
        prompt, silent = whole._prompts[index // whole.n], whole.body.max_tokens == 0
        if index not in self._begun:
            self._begun.add(index)
            # The forced tokens are a part of the prompt: they are shown with it, or not at all.
            self._hidden[index] = prompt.forced_chars
            if whole.echo:
                yield self._part(index, prompt.text, None)
        if isinstance(event, TokenEvent) and not silent:
            shown = event.text[self._hidden[index] :]
            self._hidden[index] = max(0, self._hidden[index] - len(event.text))
            if shown or event.score:
                yield self._part(index, shown, event.score)
        elif isinstance(event, FinishedEvent):
            reason = "length" if silent else event.result.finish_reason
            yield Choice(index=index, text="", finish_reason=reason, slr=LoopResult.of(event.result, reduced))

    def _part(self, index: int, text: str, score: TokenScore | None) -> Choice:
        offset = self._offset.get(index, 0)
        self._offset[index] = offset + len(text)
        return Choice(index=index, text=text, logprobs=self.whole._logprobs([score], offset) if score else None)


def check_shared(body: Any, settings: Settings) -> None:
    """What both of OpenAI's endpoints hold to limits.

    Raises:
        RequestError: a field is above its limit, or contradicts another.
    """
    if body.slr is not None:
        check_max("slr.max_iterations", body.slr.max_iterations, settings.max_iterations)
        check_max("slr.min_iterations", body.slr.min_iterations, settings.max_iterations)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream", param="stream_options")


def sampling(body: Any) -> SamplingParams:
    """How tokens are chosen, with OpenAI's defaults."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
    )


def rename_param(error: RequestError, body: Any) -> RequestError:
    """The error with the field's name in OpenAI's bodies."""
    if error.param != "max_new_tokens":
        return error
    name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
    return RequestError(str(error).replace("max_new_tokens", name), param=name)


def _encode(reasoner: LatentReasoner, text: str) -> tuple[int, ...]:
    return tuple(reasoner.tokenizer(text).input_ids)
