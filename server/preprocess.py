"""From a validated body to requests of the engine: the operator's limits, the defaults, the samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from slr_core.config import LoopConfig
from slr_core.errors import RequestError
from slr_core.generation.prepare import prepare
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
from slr_core.types import Request

from .protocol.native import DEFAULT_TOP_TOKENS, Convergence, GenerateRequest, TraceRequest
from .settings import Settings


class Bounds(Protocol):
    """What says how far a loop may go: a body of ours, or the ``slr`` object of OpenAI's."""

    @property
    def max_iterations(self) -> int | None:
        """Most iterations."""

    @property
    def min_iterations(self) -> int | None:
        """Least iterations."""

    @property
    def convergence(self) -> Convergence | None:
        """When it may stop by itself."""


def count(body: GenerateRequest) -> int:
    """How many answers a body asks for."""
    return len(body.prompt) * (body.n or 1)


def check_limits(body: GenerateRequest, settings: Settings) -> None:
    """Hold a body to the limits that the operator set.

    Raises:
        RequestError: a field is above its limit.
    """
    check_count(len(body.prompt), body.n, settings)
    check_max("max_iterations", body.max_iterations, settings.max_iterations)
    check_max("min_iterations", body.min_iterations, settings.max_iterations)
    check_max("max_new_tokens", body.max_new_tokens, settings.max_new_tokens)
    if isinstance(body, TraceRequest):
        check_max("top_tokens", body.top_tokens, settings.max_top_tokens)


def check_max(name: str, value: int | None, limit: int) -> None:
    """Hold a field to its limit.

    Raises:
        RequestError: it is above.
    """
    if value is not None and value > limit:
        raise RequestError(f"{name} must be at most {limit} on this server", param=name)


def check_count(prompts: int, n: int | None, settings: Settings) -> None:
    """Hold the number of prompts and answers to the operator's limits.

    Raises:
        RequestError: it is above.
    """
    if prompts > settings.max_prompts:
        raise RequestError(f"prompt must hold at most {settings.max_prompts} prompts, got {prompts}", "prompt")
    check_max("n", n, settings.max_n)
    answers = prompts * (n or 1)
    if answers > settings.max_queue:
        raise RequestError(
            f"prompts times n must be at most {settings.max_queue} on this server, got {answers}",
            param="prompt" if n in (None, 1) else "n",
        )


def plan(
    body: GenerateRequest, settings: Settings, reasoner: LatentReasoner, limit: int | None = None
) -> list[Request]:
    """The engine's requests in the order of the results: all samples of the first prompt, then of the next.

    Tokenizes, so it belongs in a thread.

    Args:
        body: what is asked.
        settings: the operator's limits.
        reasoner: whose texts and defaults apply.
        limit: positions of a slot of the engine.

    Raises:
        RequestError: a prompt or a setting cannot be run.
    """
    loop = resolve(reasoner.config.loop, body, settings.max_iterations)
    sampling = SamplingParams(
        temperature=body.temperature or 0.0,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
    )
    trace = isinstance(body, TraceRequest)
    top_tokens, states = 0, False
    if isinstance(body, TraceRequest):
        states = bool(body.include_states)
        asked = body.top_tokens
        top_tokens = min(DEFAULT_TOP_TOKENS, settings.max_top_tokens) if asked is None else asked
    requests = []
    for index, prompt in enumerate(body.prompt):
        try:
            request = prepare(
                reasoner,
                prompt,
                loop,
                max_new_tokens=body.max_new_tokens,
                sampling=sampling,
                stop=body.stop or (),
                trace=trace,
                top_tokens=top_tokens,
                include_states=states,
                limit=limit,
            )
            check_prompt(request.prompt_ids, settings)
        except RequestError as error:
            raise with_prompt_index(error, index, len(body.prompt)) from error
        # The checkpoint's default gives way to the operator's limit.
        request = replace(request, max_new_tokens=min(request.max_new_tokens, settings.max_new_tokens))
        requests += samples(request, body.n)
    if states:
        _check_states(reasoner, requests, settings.max_state_values)
    return requests


def with_prompt_index(error: RequestError, index: int, prompts: int) -> RequestError:
    """The error of one of several prompts, which says of which."""
    if error.param != "prompt" or prompts == 1:
        return error
    return RequestError(f"prompt {index}: {error}", param=f"prompt.{index}")


def check_prompt(ids: tuple[int, ...], settings: Settings, param: str = "prompt") -> None:
    """Hold a prompt to the operator's limit.

    Raises:
        RequestError: it has more tokens.
    """
    if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
        raise RequestError(
            f"{param} has {len(ids)} tokens, this server takes at most {settings.max_prompt_tokens}", param=param
        )


def _check_states(reasoner: LatentReasoner, requests: list[Request], limit: int) -> None:
    values = sum(reasoner.state_values(len(r.prompt_ids), r.loop.max_iterations) for r in requests)
    if values > limit:
        raise RequestError(
            f"include_states: the states may hold {values} numbers, this server returns at most {limit}; "
            "ask for fewer prompts, answers or iterations",
            param="include_states",
        )


def resolve(config: LoopConfig, bounds: Bounds | None, limit: int, at: str = "") -> ResolvedLoopParams:
    """The loop's settings, every default filled in, none above the operator's limit.

    Args:
        config: the checkpoint's defaults.
        bounds: what is asked.
        limit: most iterations.
        at: where the fields stand in the body, for errors: ``"slr."``.

    Raises:
        RequestError: a setting cannot be run.
    """
    convergence = (bounds.convergence if bounds else None) or Convergence()
    try:
        loop = LoopParams(
            max_iterations=bounds.max_iterations if bounds else None,
            min_iterations=bounds.min_iterations if bounds else None,
            criterion=convergence.criterion,
            threshold=convergence.threshold,
            patience=convergence.patience,
        ).resolve(config)
    except RequestError as error:
        inside = "convergence." if error.param in vars(convergence) else ""
        raise RequestError(str(error), param=f"{at}{inside}{error.param}") from error
    return replace(loop, max_iterations=min(loop.max_iterations, limit), min_iterations=min(loop.min_iterations, limit))


def samples(request: Request, n: int | None) -> list[Request]:
    """The request ``n`` times; where it has a seed, each draws with the next."""
    sampling = request.sampling
    if sampling.seed is None:
        return [request] * (n or 1)
    return [replace(request, sampling=replace(sampling, seed=sampling.seed + i)) for i in range(n or 1)]
