"""From any endpoint's request to requests of the engine: operator limits, defaults, samples, tokenization.

The protocol modules translate a body into a :class:`GenerationJob` and decide nothing; every limit and default is
applied here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any
from weakref import WeakSet

from slr_core.config import SLRConfig
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare, tokenize_text
from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Messages, Request, Tokens

from .settings import ServerSettings

DEFAULT_TOP_TOKENS = 5
"""Default of ``top_tokens`` in a trace."""


_CHARACTERS_PER_POSITION, _LEAST_CHARACTERS = 16, 16_384
"""The default of ``max_prompt_chars``. Texts have about four characters a token, and code with deep indentation ten."""
_used: WeakSet[LatentReasoner] = WeakSet()
_used_lock = Lock()


@dataclass(frozen=True)
class RawText:
    """A prompt that is tokenized as it stands, without the checkpoint's prompt prefix and suffix."""

    text: str


Prompt = str | Messages | Tokens | RawText


@dataclass(frozen=True)
class FieldNames:
    """How a body names the fields of a :class:`GenerationJob`, for error messages.

    Attributes:
        names: name in the body by name here; a name that is missing is the same in both.
    """

    names: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.names.get(name, name)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Let every :class:`RequestError` that is raised inside name the field of the body."""
        try:
            yield
        except RequestError as error:
            renamed = self.rename(error)
            if renamed is error:
                raise
            raise renamed from error

    def rename(self, error: RequestError) -> RequestError:
        """The same error with the field's name in the body, in ``param`` and once in the message."""
        if error.param is None or self[error.param] == error.param:
            return error
        name = self[error.param]
        return type(error)(re.sub(rf"\b{re.escape(error.param)}\b", name, str(error), count=1), param=name)


@dataclass(frozen=True)
class GenerationJob:
    """What a body asks for, in the same terms for every endpoint. ``None`` stands for a default.

    Attributes:
        prompts: the prompts, answered independently.
        n: answers per prompt.
        loop: the loop's settings.
        sampling: of the first answer; with a seed, answer ``i`` of a prompt samples with ``seed + i``.
        max_new_tokens: token limit of an answer; ``None``: the checkpoint's default.
        default_max_new_tokens: upper bound of that default; ``None``: no bound.
        stop: strings that end an answer.
        trace: measure the LM head at every iteration.
        top_tokens: number of likely tokens per iteration of a trace.
        include_states: return the states of a trace.
        trace_tokens: number of tokens whose loops a trace holds, in the workspace ``token``.
        logprobs: number of likely tokens per scored token; ``None``: do not score tokens.
        score_prompt: score the prompt's tokens as well.
        loop_after: tokens of each prompt that precede the loop; ``None``: all of them.
        template_options: variables for the chat template.
        loop_set: name of the loop adapter set; ``None``: the served model's own.
        stream: send iterations and tokens as they come.
        names: how the body names these fields.
    """

    prompts: tuple[Prompt, ...]
    n: int = 1
    loop: LoopParams = field(default_factory=LoopParams)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    default_max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    trace: bool = False
    top_tokens: int | None = None
    include_states: bool = False
    trace_tokens: int = 0
    logprobs: int | None = None
    score_prompt: bool = False
    loop_after: int | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    loop_set: str | None = None
    stream: bool = False
    names: FieldNames = field(default_factory=FieldNames)

    @property
    def answers(self) -> int:
        """Number of answers."""
        return len(self.prompts) * self.n


def check_limits(job: GenerationJob, settings: ServerSettings) -> None:
    """Check the limits that need no tokenization.

    Raises:
        RequestError: a field is above the operator's limit.
    """
    with job.names.in_errors():
        if len(job.prompts) > settings.max_prompts:
            raise RequestError(
                f"prompt must hold at most {settings.max_prompts} prompts, got {len(job.prompts)}", param="prompt"
            )
        for name, value, limit in (
            ("n", job.n, settings.max_n),
            ("max_iterations", job.loop.max_iterations, settings.max_iterations),
            ("min_iterations", job.loop.min_iterations, settings.max_iterations),
            ("max_new_tokens", job.max_new_tokens, settings.max_new_tokens),
            ("top_tokens", job.top_tokens, settings.max_top_tokens),
            ("logprobs", job.logprobs, settings.max_top_tokens),
        ):
            check_max(name, value, limit)
        if job.answers > (most := min(settings.max_answers, settings.max_queue)):
            raise RequestError(
                f"prompts times n must be at most {most} on this server, got {job.answers}",
                param="prompt" if job.n == 1 else "n",
            )


def check_characters(job: GenerationJob, settings: ServerSettings, capacity: int) -> int:
    """Check the lengths of the prompts, before they are tokenized.

    Args:
        job: what is asked for.
        settings: the operator's limits.
        capacity: positions of a slot of the engine.

    Returns:
        The number of characters of all prompts.

    Raises:
        RequestError: a prompt has more than the limit.
    """
    limit = settings.max_prompt_chars or max(_LEAST_CHARACTERS, _CHARACTERS_PER_POSITION * capacity)
    counts = [_characters(prompt) for prompt in job.prompts]
    for index, count in enumerate(counts):
        if count > limit:
            name = job.names["prompt"]
            error = RequestError(f"{name} has {count} characters, this server takes at most {limit}", param=name)
            raise _with_prompt_index(error, index, job)
    return sum(counts)


def _characters(prompt: Prompt) -> int:
    if isinstance(prompt, Tokens):
        return 0
    if isinstance(prompt, RawText):
        return len(prompt.text)
    return len(prompt) if isinstance(prompt, str) else sum(len(v) for message in prompt for v in message.values())


def check_max(name: str, value: int | None, limit: int) -> None:
    """Check one field.

    Raises:
        RequestError: it is above its limit.
    """
    if value is not None and value > limit:
        raise RequestError(f"{name} must be at most {limit} on this server", param=name)


def preprocess(
    job: GenerationJob, settings: ServerSettings, reasoner: LatentReasoner, capacity: int | None = None
) -> list[Request]:
    """The engine's requests in the order of the answers: all samples of the first prompt, then of the next.

    Tokenizes, so call it in a thread.

    Args:
        job: what is asked for; :func:`check_limits` accepts it.
        settings: the operator's limits.
        reasoner: the model whose texts, tokenizer and defaults apply.
        capacity: positions of a slot of the engine; ``None``: what the model can address.

    Raises:
        RequestError: a prompt or a setting cannot be run.
    """
    _use_once(reasoner)
    with job.names.in_errors():
        loop = _resolve_loop(job.loop, reasoner.config, settings.max_iterations)
        _check_template_options(job.template_options, reasoner)
    requests: list[Request] = []
    for index, prompt in enumerate(job.prompts):
        try:
            with job.names.in_errors():
                request = _preprocess_prompt(prompt, loop, job, settings, reasoner, capacity)
        except RequestError as error:
            raise _with_prompt_index(error, index, job) from error
        requests += _samples(request, job.n)
    _check_response(job, requests, settings.max_response_values)
    if job.include_states:
        _check_states(reasoner, requests, settings.max_state_values)
    return requests


def _use_once(reasoner: LatentReasoner) -> None:
    """Let one thread alone use a tokenizer first: its first use changes it, if its file sets truncation or padding."""
    with _used_lock:
        if reasoner not in _used:
            tokenize_text(reasoner, "a")
            _used.add(reasoner)


def _preprocess_prompt(
    prompt: Prompt,
    loop: ResolvedLoopParams,
    job: GenerationJob,
    settings: ServerSettings,
    reasoner: LatentReasoner,
    capacity: int | None,
) -> Request:
    forced: tuple[int, ...] = ()
    if isinstance(prompt, RawText):
        prompt = Tokens(tuple(tokenize_text(reasoner, prompt.text)))
    if isinstance(prompt, Tokens):
        _check_prompt_tokens(prompt.ids, settings)
        if job.loop_after is not None:
            if job.loop_after > len(prompt.ids):
                raise RequestError(
                    f"loop_after must be at most {len(prompt.ids)}, the prompt's tokens, got {job.loop_after}",
                    param="loop_after",
                )
            prompt, forced = Tokens(prompt.ids[: job.loop_after]), prompt.ids[job.loop_after :]
    top_tokens = min(DEFAULT_TOP_TOKENS, settings.max_top_tokens) if job.top_tokens is None else job.top_tokens
    request = prepare(
        reasoner,
        prompt,
        loop,
        max_new_tokens=job.max_new_tokens,
        sampling=job.sampling,
        stop=job.stop,
        trace=job.trace,
        top_tokens=top_tokens if job.trace else 0,
        include_states=job.include_states,
        trace_tokens=job.trace_tokens,
        logprobs=job.logprobs,
        score_prompt=job.score_prompt,
        forced_ids=forced,
        limit=capacity,
    )
    _check_prompt_tokens(request.prompt_ids, settings)
    if job.max_new_tokens is None:
        most = min(job.default_max_new_tokens or settings.max_new_tokens, settings.max_new_tokens)
        request = replace(request, max_new_tokens=min(request.max_new_tokens, most))
    return request


def _resolve_loop(params: LoopParams, config: SLRConfig, limit: int) -> ResolvedLoopParams:
    """Fill in the checkpoint's defaults, which give way to the operator's limit."""
    loop = params.resolve(config)
    return replace(loop, max_iterations=min(loop.max_iterations, limit), min_iterations=min(loop.min_iterations, limit))


def _samples(request: Request, n: int) -> list[Request]:
    """The request ``n`` times; if it has a seed, each samples with the next."""
    sampling = request.sampling
    if sampling.seed is None:
        return [request] * n
    return [replace(request, sampling=replace(sampling, seed=sampling.seed + i)) for i in range(n)]


def _check_prompt_tokens(ids: tuple[int, ...], settings: ServerSettings) -> None:
    if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
        raise RequestError(
            f"prompt has {len(ids)} tokens, this server takes at most {settings.max_prompt_tokens}", param="prompt"
        )


def _check_response(job: GenerationJob, requests: list[Request], limit: int) -> None:
    values, name = sum(r.loop.max_iterations * r.top_tokens for r in requests), "top_tokens"
    if values <= limit and job.trace_tokens:
        name = "trace_tokens"
        values = sum(
            r.loop.max_iterations * max(1, r.top_tokens) * (1 + min(job.trace_tokens, r.max_new_tokens))
            for r in requests
        )
    if values <= limit and job.logprobs is not None:
        name = "logprobs"
        scored = sum(r.max_new_tokens for r in requests)
        scored += sum(len(r.prompt_ids) + len(r.forced_ids) for r in requests if r.score_prompt)
        values = scored * max(1, job.logprobs)
    if values > limit:
        name = job.names[name]
        raise RequestError(
            f"{name}: the response may hold {values} of them, this server returns at most {limit}; "
            "ask for fewer prompts, answers, iterations or tokens",
            param=name,
        )


def _check_states(reasoner: LatentReasoner, requests: list[Request], limit: int) -> None:
    values = sum(reasoner.state_values(len(r.prompt_ids), r.loop.max_iterations) for r in requests)
    if values > limit:
        raise RequestError(
            f"include_states: the states may hold {values} numbers, this server returns at most {limit}; "
            "ask for fewer prompts, answers or iterations",
            param="include_states",
        )


def _check_template_options(options: Mapping[str, Any], reasoner: LatentReasoner) -> None:
    """Refuse variables that the chat template may read: they would change the prompt. Others change nothing."""
    template = str(reasoner.config.text.chat_template or reasoner.tokenizer.chat_template)
    for name in options:
        if re.search(rf"\b{re.escape(name)}\b", template):
            raise RequestError(
                f"template_options.{name} is not supported: the chat template of this checkpoint reads it",
                param="template_options",
            )


def _with_prompt_index(error: RequestError, index: int, job: GenerationJob) -> RequestError:
    """If one of several prompts is at fault, say which."""
    name = job.names["prompt"]
    if error.param != name or len(job.prompts) == 1:
        return error
    return RequestError(f"prompt {index}: {error}", param=f"{name}.{index}")
