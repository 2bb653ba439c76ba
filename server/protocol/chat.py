"""``/v1/chat/completions``: from its body to the engine's requests, and from their results to its choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slr_core.engine import Event, FinishedEvent, TokenEvent
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from slr_core.model.reasoner import LatentReasoner
from slr_core.types import Request, Result, TokenScore

from ..preprocess import check_count, check_max, check_prompt, resolve, samples
from ..service import GenerationJob
from ..settings import Settings
from .completions import Vocabulary, check_shared, rename_param, sampling
from .openai import (
    AssistantMessage,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    LoopResult,
    TopLogprob,
    Usage,
)

_NEVER = -9999.0
"""OpenAI's log-probability of what cannot be."""


class Chat:
    """One body, and what its answers are made of.

    Raises:
        RequestError: a field is above its limit, or contradicts another.
    """

    def __init__(self, body: ChatRequest, settings: Settings) -> None:
        self.body, self.settings = body, settings
        self._vocabulary: Vocabulary | None = None
        self._begun: set[int] = set()
        check_count(1, body.n, settings)
        check_shared(body, settings)
        check_max("max_tokens", body.max_tokens, settings.max_new_tokens)
        check_max("max_completion_tokens", body.max_completion_tokens, settings.max_new_tokens)
        check_max("top_logprobs", body.top_logprobs, settings.max_top_tokens)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise RequestError("max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")

    def ask(self, loop_set: str | None) -> GenerationJob:
        """What it asks of the engine."""
        return GenerationJob(self.body.n or 1, self._plan, loop_set, bool(self.body.stream))

    def _plan(self, reasoner: LatentReasoner, limit: int) -> list[Request]:
        body, settings = self.body, self.settings
        self._vocabulary = Vocabulary(reasoner)
        roles = {"developer": "system"}  # the newer name; templates know the older
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in body.messages]
        try:
            request = prepare(
                reasoner,
                messages,
                resolve(reasoner.config.loop, body.slr, settings.max_iterations, "slr."),
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                sampling=sampling(body),
                stop=body.stop or (),
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                limit=limit,
            )
            check_prompt(request.prompt_ids, settings, "messages")
        except RequestError as error:
            raise rename_param(error, body) from error
        return samples(request, body.n)

    # -- answers ------------------------------------------------------------------------------------

    def choices(self, results: Sequence[tuple[Result, bool]]) -> list[ChatChoice]:
        """The choices of a whole answer; decodes, so it belongs in a thread."""
        return [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=result.text),
                logprobs=self._logprobs(result.scores) if self.body.logprobs else None,
                finish_reason=result.finish_reason,
                slr=LoopResult.of(result, reduced),
            )
            for index, (result, reduced) in enumerate(results)
        ]

    def parts(self, index: int, event: Event, reduced: bool) -> Iterator[ChunkChoice]:
        """What an event adds to an answer, in a stream."""
        if index not in self._begun:
            self._begun.add(index)
            yield ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
        if isinstance(event, TokenEvent) and (event.text or event.score):
            scores = self._logprobs([event.score]) if event.score else None
            yield ChunkChoice(index=index, delta=Delta(content=event.text), logprobs=scores)
        elif isinstance(event, FinishedEvent):
            reason = event.result.finish_reason
            yield ChunkChoice(
                index=index, delta=Delta(), finish_reason=reason, slr=LoopResult.of(event.result, reduced)
            )

    def usage(self, results: Sequence[Result]) -> Usage:
        """Of all choices, in any order."""
        prompt, written = results[0].prompt_tokens, sum(result.completion_tokens for result in results)
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)

    def _logprobs(self, scores: Sequence[TokenScore]) -> ChatLogprobs:
        def one(token_id: int, logprob: float | None) -> TopLogprob:
            assert self._vocabulary is not None
            token = self._vocabulary.token(token_id)
            return TopLogprob(token=token, logprob=_NEVER if logprob is None else logprob, bytes=list(token.encode()))

        return ChatLogprobs(
            content=[
                ChatLogprob(**vars(one(score.token_id, score.logprob)), top_logprobs=[one(*top) for top in score.top])
                for score in scores
            ]
        )
