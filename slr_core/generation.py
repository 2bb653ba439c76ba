"""From prompts to answers with the reference: render, encode, loop, decode; one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jinja2 import TemplateError
from torch import Tensor

from slr_core.context import Context, LoopOutput
from slr_core.diagnostics import IterationRecord, Stability
from slr_core.errors import RequestError
from slr_core.loop.convergence import ExitReason, LoopSettings
from slr_core.model import LatentReasoner
from slr_core.sampling import SamplingSettings
from slr_core.scoring import TokenScore, score
from slr_core.writing import Answer, FinishReason, LatentWriter, LMHead, pad, put_into_words, write


@dataclass(frozen=True)
class Request:
    """One prompt, ready to run: tokenized, every setting resolved. Made by :func:`prepare`, which says what each
    field means."""

    prompt_ids: tuple[int, ...]
    answer_prefix_ids: tuple[int, ...]
    loop: LoopSettings
    max_new_tokens: int
    sampling: SamplingSettings
    stop: tuple[str, ...]
    trace: bool
    top_tokens: int
    include_states: bool
    logprobs: int | None = None
    score_prompt: bool = False
    forced_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds. ``loop_s`` ends when the request leaves the loop; waiting for its batch counts as decoding."""

    queue_s: float
    prefill_s: float
    loop_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Result:
    """What became of a request.

    ``final_change`` is the relative change of the last iteration; ``forward_passes`` what the request
    alone would have cost; ``first_token_s`` the seconds from its arrival to its first token. The head's
    measures in ``records`` are complete for a traced request alone.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    iterations: int
    exit_reason: ExitReason
    final_change: float | None
    prompt_tokens: int
    forward_passes: int
    timings: Timings
    first_token_s: float
    records: tuple[IterationRecord, ...]
    stability: Stability
    states: Tensor | None = None
    """h_0 ... h_t as they were, ``[t + 1, W, d]``, on the CPU; where the request asked for them."""
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens written; where the request asked for log-probabilities."""
    prompt_scores: tuple[TokenScore, ...] = ()
    """Of the prompt's tokens by the base model; where the request asked for them."""

    @property
    def completion_tokens(self) -> int:
        """Tokens written, the end token included."""
        return len(self.token_ids)


Think = Callable[[Context, Sequence[LoopSettings]], LoopOutput]
"""From an encoded batch to its finished loops."""
Messages = Sequence[Mapping[str, str]]
"""A chat: ``{"role": ..., "content": ...}`` each."""


@dataclass(frozen=True)
class Tokens:
    """A prompt that is taken as it is: none of the checkpoint's texts apply to it."""

    ids: tuple[int, ...]


def prepare(
    reasoner: LatentReasoner,
    prompt: str | Messages | Tokens,
    loop: LoopSettings,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingSettings | None = None,
    stop: str | Sequence[str] = (),
    trace: bool = False,
    top_tokens: int = 0,
    include_states: bool = False,
    logprobs: int | None = None,
    score_prompt: bool = False,
    forced_ids: tuple[int, ...] = (),
    limit: int | None = None,
) -> Request:
    """Apply the checkpoint's text settings and check that the request fits the model.

    Args:
        reasoner: whose tokenizer, texts and limits apply.
        prompt: a text, which gets the prompt prefix and suffix, a chat, which gets the chat template, or tokens,
            which get nothing.
        loop: resolved settings.
        max_new_tokens: the checkpoint's default where ``None``; a default gives way to what fits.
        sampling: greedy where ``None``.
        stop: a string, or several, that end the answer, besides the checkpoint's.
        trace: measure the head at every iteration, and put the states into words where a decoder can.
        top_tokens: likely tokens to record per iteration.
        include_states: return the states themselves.
        logprobs: how many of the likeliest tokens to tell of, with their log-probabilities, wherever a token
            is scored; ``None``: no token is.
        score_prompt: score the prompt's tokens too, by the base model: no loop has run before them.
        forced_ids: tokens that the answer begins with, written and scored like others but not chosen; they do
            not count towards ``max_new_tokens``, and neither they nor their text end it.
        limit: positions that prompt, loop and answer may take; by default what the model can address.

    Raises:
        RequestError: a setting is out of range, the prompt is empty, or prompt, loop and answer together
            exceed the model's positions.
    """
    text = reasoner.config.text
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}", param="max_new_tokens")
    stop = (stop,) if isinstance(stop, str) else stop
    if "" in stop:
        raise RequestError("stop must not hold an empty string", param="stop")
    raw = isinstance(prompt, Tokens)
    ids = _checked(reasoner, prompt.ids) if isinstance(prompt, Tokens) else _tokenize(reasoner, prompt)
    prefix: list[int] = []
    if text.answer_prefix and not raw:
        prefix = reasoner.tokenizer(text.answer_prefix, add_special_tokens=False).input_ids
    taken = reasoner.workspace.loop_positions(loop.max_iterations) + len(prefix) + len(forced_ids)
    limit = reasoner.max_positions if limit is None else min(limit, reasoner.max_positions)
    most = text.max_new_tokens if max_new_tokens is None else max_new_tokens
    if len(ids) + taken + 1 > limit:
        raise RequestError(
            f"prompt has {len(ids)} tokens; with {loop.max_iterations} iterations and an answer at most "
            f"{max(0, limit - taken - 1)} fit this model",
            param=_field(prompt),
        )
    if len(ids) + taken + most > limit:
        if max_new_tokens is not None:
            raise RequestError(
                f"max_new_tokens must be at most {limit - len(ids) - taken} with this prompt of "
                f"{len(ids)} tokens and {loop.max_iterations} iterations, got {most}",
                param="max_new_tokens",
            )
        most = limit - len(ids) - taken
    return Request(
        prompt_ids=tuple(ids),
        answer_prefix_ids=tuple(prefix),
        loop=loop,
        max_new_tokens=most,
        sampling=sampling or SamplingSettings(),
        stop=tuple(stop) if raw else (*text.stop, *stop),
        trace=trace,
        top_tokens=top_tokens,
        include_states=include_states,
        logprobs=logprobs,
        score_prompt=score_prompt,
        forced_ids=forced_ids,
    )


def _field(prompt: str | Messages | Tokens) -> str:
    return "prompt" if isinstance(prompt, str | Tokens) else "messages"


def _checked(reasoner: LatentReasoner, ids: tuple[int, ...]) -> list[int]:
    known = reasoner.vocabulary
    if not ids:
        raise RequestError("prompt must hold at least one token", param="prompt")
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise RequestError(f"prompt must hold token ids from 0 to {known - 1}, got {unknown}", param="prompt")
    return list(ids)


def _tokenize(reasoner: LatentReasoner, prompt: str | Messages) -> list[int]:
    text, tokenizer = reasoner.config.text, reasoner.tokenizer
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RequestError("prompt must not be empty", param="prompt")
        rendered = text.prompt_prefix + prompt + text.prompt_suffix
    else:
        rendered = _render_chat(reasoner, prompt)
    try:
        rendered.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt is not valid Unicode: {error.reason}", param=_field(prompt)) from error
    # A chat template writes its own special tokens.
    ids: list[int] = tokenizer(rendered, add_special_tokens=isinstance(prompt, str)).input_ids
    if not ids:
        raise RequestError("prompt holds no tokens of this model", param=_field(prompt))
    return ids


def _render_chat(reasoner: LatentReasoner, messages: Messages) -> str:
    template = reasoner.config.text.chat_template or None
    if template is None and not reasoner.tokenizer.chat_template:
        raise RequestError("this checkpoint has no chat template", param="messages")
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    try:
        return str(
            reasoner.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error


@torch.inference_mode()
def generate(
    reasoner: LatentReasoner,
    requests: Sequence[Request],
    *,
    queued_s: Sequence[float] | None = None,
    think: Think | None = None,
) -> list[Result]:
    """Run a batch to its end: each row gets the iterations and the tokens that it would get alone.

    Args:
        reasoner: in eval mode.
        requests: any mix of settings.
        queued_s: seconds that each request waited before, for its timings.
        think: runs the loop in place of :meth:`LatentReasoner.loop`, for experiments that interfere with it.
    """
    started = time.perf_counter()
    ids, present = pad([request.prompt_ids for request in requests], reasoner.device)
    context = reasoner.encode(ids, present)
    prefill_s = time.perf_counter() - started
    top_tokens, traced = max(request.top_tokens for request in requests), any(request.trace for request in requests)
    think = think or partial(reasoner.loop, top_tokens=top_tokens, read_head=traced)
    looped = think(context, [request.loop for request in requests])
    answers = [Answer(reasoner, request) for request in requests]
    by_decoder = [reasoner.answers_from_states and kept > 0 for kept in looped.kept]
    write(answers, LMHead(reasoner, looped, requests), [not by for by in by_decoder])
    write(answers, LatentWriter.of_answers(reasoner, looped, requests), by_decoder)
    scored = [_prompt_scores(reasoner, request) for request in requests]
    thoughts = put_into_words(reasoner, looped.states, [request.trace for request in requests])
    results = [
        _result(
            reasoner, looped, i, request, answers[i], thoughts[i], prefill_s, started, queued_s[i] if queued_s else 0.0
        )
        for i, request in enumerate(requests)
    ]
    return [replace(result, prompt_scores=scores) for result, scores in zip(results, scored, strict=True)]


def _prompt_scores(reasoner: LatentReasoner, request: Request) -> tuple[TokenScore, ...]:
    if not request.score_prompt:
        return ()
    ids = torch.tensor([request.prompt_ids], device=reasoner.device)
    with reasoner.adapters.use(None):
        logits = reasoner.base(input_ids=ids, use_cache=False).logits[0, :-1]
    return (
        TokenScore(request.prompt_ids[0], None),
        *score(logits, request.prompt_ids[1:], request.logprobs or 0),
    )


def _result(
    reasoner: LatentReasoner,
    looped: LoopOutput,
    row: int,
    request: Request,
    answer: Answer,
    thoughts: list[str | None],
    prefill_s: float,
    started: float,
    queue_s: float,
) -> Result:
    loop_s = looped.durations_s[row]
    own_s = answer.ended_at - started
    records = looped.records[row]
    return Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finished or "length",
        iterations=looped.iterations[row],
        exit_reason=looped.exit_reasons[row],
        final_change=records[-1].relative_change if records else None,
        prompt_tokens=len(request.prompt_ids),
        forward_passes=passes(reasoner, request, looped.iterations[row], looped.kept[row], len(answer.tokens)),
        timings=Timings(queue_s, prefill_s, loop_s, own_s - prefill_s - loop_s, queue_s + own_s),
        first_token_s=queue_s + answer.began_at - started,
        # A batch reads as many tokens as its most curious row.
        records=tuple(
            replace(record, top_tokens=record.top_tokens[: request.top_tokens], thought=thought)
            for record, thought in zip(records, thoughts, strict=True)
        ),
        stability=looped.stability[row],
        states=looped.states[row].float().cpu() if request.include_states else None,
        scores=tuple(answer.scores),
    )


def passes(reasoner: LatentReasoner, request: Request, iterations: int, kept: int, tokens: int) -> int:
    """Passes of the base model that a request alone takes; those of the latent decoder's few layers do not count."""
    passes = reasoner.workspace.passes(iterations) + (request.score_prompt and not reasoner.workspace.prefills)
    if reasoner.answers_from_states and kept:
        return passes
    return passes + reasoner.workspace.closing_passes(kept) + bool(request.answer_prefix_ids) + tokens - 1
