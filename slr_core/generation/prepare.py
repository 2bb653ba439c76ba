"""From a prompt to a request that fits the model: render, tokenize, check."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from slr_core.errors import RequestError
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import ResolvedLoopParams, SamplingParams
from slr_core.types import Messages, Request, Tokens


def prepare(
    reasoner: LatentReasoner,
    prompt: str | Messages | Tokens,
    loop: ResolvedLoopParams,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
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
        sampling=sampling or SamplingParams(),
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
