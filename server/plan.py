"""From a validated body to requests of the engine: the operator's limits, the defaults, the samples."""

from __future__ import annotations

from dataclasses import replace

from server.schemas import DEFAULT_TOP_TOKENS, Convergence, GenerateRequest, TraceRequest
from server.settings import Settings
from slr_core.errors import RequestError
from slr_core.generation import Request, prepare
from slr_core.loop.convergence import LoopSettings
from slr_core.model import LatentReasoner
from slr_core.sampling import SamplingSettings


def count(body: GenerateRequest) -> int:
    """How many answers a body asks for."""
    return len(body.prompt) * (body.n or 1)


def check_limits(body: GenerateRequest, settings: Settings) -> None:
    """Hold a body to the limits that the operator set.

    Raises:
        RequestError: a field is above its limit.
    """
    limits = {
        "n": settings.max_n,
        "max_iterations": settings.max_iterations,
        "min_iterations": settings.max_iterations,
        "max_new_tokens": settings.max_new_tokens,
        "top_tokens": settings.max_top_tokens,
    }
    if len(body.prompt) > settings.max_prompts:
        raise RequestError(f"prompt must hold at most {settings.max_prompts} prompts, got {len(body.prompt)}", "prompt")
    for name, limit in limits.items():
        value = getattr(body, name, None)
        if value is not None and value > limit:
            raise RequestError(f"{name} must be at most {limit} on this server", param=name)
    if count(body) > settings.max_queue:
        raise RequestError(
            f"prompts times n must be at most {settings.max_queue} on this server, got {count(body)}",
            param="prompt" if body.n in (None, 1) else "n",
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
    loop = _loop(reasoner, body, settings.max_iterations)
    sampling = SamplingSettings(
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
        except RequestError as error:
            if error.param == "prompt" and len(body.prompt) > 1:
                raise RequestError(f"prompt {index}: {error}", param=f"prompt.{index}") from error
            raise
        check_prompt(request.prompt_ids, settings)
        # The checkpoint's default gives way to the operator's limit.
        request = replace(request, max_new_tokens=min(request.max_new_tokens, settings.max_new_tokens))
        requests += [replace(request, sampling=_sample(sampling, i)) for i in range(body.n or 1)]
    if states:
        _check_states(reasoner, requests, settings.max_state_values)
    return requests


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


def _loop(reasoner: LatentReasoner, body: GenerateRequest, limit: int) -> LoopSettings:
    convergence = body.convergence or Convergence()
    try:
        loop = LoopSettings.resolve(
            reasoner.config.loop,
            max_iterations=body.max_iterations,
            min_iterations=body.min_iterations,
            criterion=convergence.criterion,
            threshold=convergence.threshold,
            patience=convergence.patience,
        )
    except RequestError as error:
        if error.param in vars(convergence):
            raise RequestError(str(error), param=f"convergence.{error.param}") from error
        raise
    return replace(loop, max_iterations=min(loop.max_iterations, limit), min_iterations=min(loop.min_iterations, limit))


def _sample(sampling: SamplingSettings, index: int) -> SamplingSettings:
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)
