"""From a prompt to a request that fits the model: apply templates, tokenize, check limits."""

from __future__ import annotations

from collections.abc import Sequence

from slr_core.errors import RequestError
from slr_core.generation.chat_template import render_chat
from slr_core.model.base_support import attention_window
from slr_core.model.looped import LoopedModel
from slr_core.panics import panics_as_errors
from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
from slr_core.types import Messages, Request, Tokens

_MAX_REFUSAL = 400
"""Characters of a chat template's error."""


def prepare(
    reasoner: LoopedModel,
    prompt: str | Messages | Tokens,
    loop: LoopParams | ResolvedLoopParams | None = None,
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
    trace_tokens: int = 0,
    limit: int | None = None,
) -> Request:
    """Apply the checkpoint's text settings and check that the request fits the model.

    Args:
        reasoner: the model whose tokenizer, texts, defaults and limits apply.
        prompt: a text, which gets the prompt prefix and suffix; a chat, which gets the chat template; or tokens,
            which are used as they are.
        loop: fields that are unset take the checkpoint's defaults; ``None``: all of them.
        max_new_tokens: ``None``: the checkpoint's default, reduced to what fits.
        sampling: ``None``: greedy.
        stop: one or more strings that end the answer, besides the checkpoint's.
        trace: measure the LM head at every iteration, and decode thoughts where there is a latent decoder.
        top_tokens: number of most likely tokens to record per iteration.
        include_states: return the states.
        logprobs: number of most likely tokens to return with every scored token; ``None``: do not score tokens.
        score_prompt: score the prompt's tokens too, by the base model, as no loop has run before them.
        forced_ids: tokens that the answer begins with. They are scored like the others but not chosen, do not count
            towards ``max_new_tokens``, and do not end the answer.
        trace_tokens: in the workspace ``token``, the number of tokens whose loops are recorded.
        limit: maximum cache positions of prompt, loop and answer together; ``None``: what the model can address.

    Raises:
        RequestError: a setting is out of range, the prompt is empty, or prompt, loop and answer together
            exceed the model's positions.
    """
    text = reasoner.config.text
    if not isinstance(loop, ResolvedLoopParams):
        loop = (loop or LoopParams()).resolve(reasoner.config)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}", param="max_new_tokens")
    for name, count in (("top_tokens", top_tokens), ("logprobs", logprobs or 0), ("trace_tokens", trace_tokens)):
        if count < 0:
            raise RequestError(f"{name} must not be negative, got {count}", param=name)
    stop = (stop,) if isinstance(stop, str) else stop
    if "" in stop:
        raise RequestError("stop must not hold an empty string", param="stop")
    workspace = reasoner.workspace
    if trace_tokens and not workspace.per_token:
        raise RequestError("trace_tokens needs the workspace token: in others, one loop runs", param="trace_tokens")
    raw = isinstance(prompt, Tokens)
    ids = _check_ids(reasoner, prompt.ids) if isinstance(prompt, Tokens) else _tokenize_prompt(reasoner, prompt)
    prefix: list[int] = []
    if text.answer_prefix and not raw:
        prefix = _tokenize(reasoner, text.answer_prefix, "prompt", add_special_tokens=False)
    reserved = workspace.loop_positions(loop.max_iterations) + len(prefix) + len(forced_ids)
    copies = workspace.cache_copies(loop.max_iterations)
    limit = reasoner.max_positions if limit is None else min(limit // copies, reasoner.max_positions)
    answer_limit = text.max_new_tokens if max_new_tokens is None else max_new_tokens
    if len(ids) + reserved + 1 > limit:
        raise RequestError(
            f"prompt has {len(ids)} tokens; with {loop.max_iterations} iterations and an answer at most "
            f"{max(0, limit - reserved - 1)} fit {_place(reasoner, limit, copies)}{_window_note(reasoner, limit)}",
            param=_param_name(prompt),
        )
    if len(ids) + reserved + answer_limit > limit:
        if max_new_tokens is not None:
            raise RequestError(
                f"max_new_tokens must be at most {limit - len(ids) - reserved} with this prompt of "
                f"{len(ids)} tokens and {loop.max_iterations} iterations{_window_note(reasoner, limit)}, "
                f"got {answer_limit}",
                param="max_new_tokens",
            )
        answer_limit = limit - len(ids) - reserved
    return Request(
        prompt_ids=tuple(ids),
        answer_prefix_ids=tuple(prefix),
        loop=loop,
        max_new_tokens=answer_limit,
        sampling=sampling or SamplingParams(),
        stop=tuple(stop) if raw else (*text.stop, *stop),
        trace=trace,
        top_tokens=top_tokens,
        include_states=include_states,
        logprobs=logprobs,
        score_prompt=score_prompt,
        forced_ids=forced_ids,
        trace_tokens=trace_tokens,
    )


def _place(reasoner: LoopedModel, limit: int, copies: int) -> str:
    """What ``limit`` positions are the room of."""
    if limit == reasoner.max_positions:
        return "this model"
    return "a slot" if copies == 1 else f"a slot, which holds {copies} key/value caches of {limit} positions"


def _window_note(reasoner: LoopedModel, limit: int) -> str:
    """Why no more positions fit, where a sliding window is the reason."""
    window = attention_window(reasoner.base.config)
    return f" (positions end at its sliding window of {window})" if window == limit else ""


def tokenize_text(reasoner: LoopedModel, text: str) -> list[int]:
    """Ids of a text with the special tokens that the tokenizer adds; one that the text begins with is not added again.

    Raises:
        RequestError: the text is not valid Unicode.
    """
    ids = _tokenize(reasoner, text, "prompt", add_special_tokens=True)
    if ids[:1] == ids[1:2]:
        plain = _tokenize(reasoner, text, "prompt", add_special_tokens=False)
        if plain and ids[1 : 1 + len(plain)] == plain:
            return ids[1:]
    return ids


def _tokenize(reasoner: LoopedModel, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt is not valid Unicode: {error.reason}", param=param) from error
    try:
        with panics_as_errors():
            ids: list[int] = reasoner.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    except RuntimeError as error:
        raise RequestError(f"the tokenizer cannot process this prompt: {error}", param=param) from error
    return ids


def _tokenize_prompt(reasoner: LoopedModel, prompt: str | Messages) -> list[int]:
    text = reasoner.config.text
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RequestError("prompt must not be empty", param="prompt")
        ids = tokenize_text(reasoner, text.wrap_prompt(prompt))
    else:
        # A chat template writes its own special tokens.
        ids = _tokenize(reasoner, _render_chat(reasoner, prompt), "messages", add_special_tokens=False)
    if not ids:
        raise RequestError("prompt holds no tokens of this model", param=_param_name(prompt))
    return ids


def _render_chat(reasoner: LoopedModel, messages: Messages) -> str:
    template, tokenizer = reasoner.config.text.chat_template or None, reasoner.tokenizer
    if template is None and not tokenizer.chat_template:
        raise RequestError(
            "this checkpoint has no chat template; to add one, set text.chat_template in its slr_config.json, "
            "or put a chat_template.jinja beside its tokenizer files",
            param="messages",
        )
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    try:
        return render_chat(tokenizer.get_chat_template(template), messages, tokenizer.special_tokens_map)
    except Exception as error:  # a template may raise any kind
        refusal = str(error)[:_MAX_REFUSAL]
        raise RequestError(f"the chat template refuses the messages: {refusal}", param="messages") from error


def reads_chats(reasoner: LoopedModel) -> bool:
    """Whether the chat template shows the model all messages of a chat, as that of a chat model does."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"message {i}"} for i, role in enumerate(roles)]
    try:
        text = _render_chat(reasoner, messages)
    except RequestError:
        return False
    return all(message["content"] in text for message in messages)


def _check_ids(reasoner: LoopedModel, ids: tuple[int, ...]) -> list[int]:
    known = reasoner.vocab_size
    if not ids:
        raise RequestError("prompt must hold at least one token", param="prompt")
    unknown = next((token for token in ids if not 0 <= token < known), None)
    if unknown is not None:
        raise RequestError(f"prompt must hold token ids from 0 to {known - 1}, got {unknown}", param="prompt")
    return list(ids)


def _param_name(prompt: str | Messages | Tokens) -> str:
    return "prompt" if isinstance(prompt, str | Tokens) else "messages"
