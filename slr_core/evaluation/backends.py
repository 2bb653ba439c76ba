"""Where answers come from: a model in this process, or a server."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import httpx

from slr_core.engine import Engine
from slr_core.errors import ConfigError, EngineError, RequestError
from slr_core.evaluation.cost import Cost
from slr_core.evaluation.outcomes import Answered
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import RunLoop, generate
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import LoopParams, SamplingParams
from slr_core.types import Request

SLOTS = 64
"""Questions that the engine answers at once; its cache is as large as its memory allows, whatever this is."""


@dataclass(frozen=True)
class GenerationOptions:
    """What a method wants of every prompt.

    Attributes:
        loop: arguments of :meth:`LoopParams.resolve` over the checkpoint's defaults.
        max_new_tokens: the checkpoint's default where ``None``; a model in this process takes what fits of it.
        temperature: 0 is greedy.
        samples: answers per prompt.
    """

    loop: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float = 0.0
    samples: int = 1


class Backend(Protocol):
    """Answers prompts.

    Attributes:
        batches_at_once: so many batches keep it busy; :meth:`answer` may be called from as many threads.
    """

    batches_at_once: int

    def answer(self, prompts: Sequence[str], ask: GenerationOptions, seeds: Sequence[int]) -> list[list[Answered]]:
        """``ask.samples`` answers per prompt; prompt i draws from ``seeds[i]`` on."""
        ...


class Local:
    """A model in this process, run by the engine that serves."""

    batches_at_once = 4

    def __init__(self, reasoner: LatentReasoner) -> None:
        self.reasoner, self.cost = reasoner, Cost(reasoner)
        self._starting = threading.Lock()

    @property
    def engine(self) -> Engine:
        """It is started when it is first asked for, and ends with this backend."""
        with self._starting:
            return self._engine

    @property
    def rows_per_step(self) -> float | None:
        """How full the engine's steps were on average; ``None`` where it was not used."""
        counters = self.engine.counters if "_engine" in vars(self) else None
        return counters.row_steps / counters.steps if counters and counters.steps else None

    @cached_property
    def _engine(self) -> Engine:
        engine = Engine(self.reasoner, slots=SLOTS)
        weakref.finalize(self, engine.close)
        return engine

    def answer(
        self, prompts: Sequence[str], ask: GenerationOptions, seeds: Sequence[int], run_loop: RunLoop | None = None
    ) -> list[list[Answered]]:
        """As :class:`Backend`; ``think`` interferes with the loops, which come prompt by prompt, sample by sample:
        that is the reference's work, and it must have the model alone."""
        requests = [
            self.request(prompt, ask, seed + sample)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(ask.samples)
        ]
        if run_loop is None:
            results = [future.result() for future in [self.engine.submit(request) for request in requests]]
        else:
            results = generate(self.reasoner, requests, run_loop=run_loop)
        cost, added = self.cost.request, self.cost.added_parameters
        answered = [Answered.of(r, cost(r.prompt_tokens, r.iterations, r.completion_tokens), added) for r in results]
        return _grouped(answered, ask.samples)

    def request(self, prompt: str, ask: GenerationOptions, seed: int) -> Request:
        """One answer's request, its length cut to what fits.

        Raises:
            RequestError: nothing does.
        """
        loop = LoopParams(**ask.loop).resolve(self.reasoner.config.loop)
        request = prepare(self.reasoner, prompt, loop, sampling=SamplingParams(ask.temperature, seed=seed))
        if ask.max_new_tokens is None:
            return request
        taken = self.reasoner.workspace.loop_positions(loop.max_iterations) + len(request.answer_prefix_ids)
        fits = self.reasoner.max_positions - len(request.prompt_ids) - taken
        return replace(request, max_new_tokens=min(ask.max_new_tokens, fits))


class Remote:
    """A running server, asked through ``POST /trace``, one batch after the other.

    Args:
        url: where it listens.
        timeout_s: how long a batch may take.

    Raises:
        ConfigError: ``url`` is none.
    """

    batches_at_once = 1

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        try:
            # Connections are not kept: nobody would close them, and a batch takes longer than to connect.
            limits = httpx.Limits(max_keepalive_connections=0)
            headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
            self.client = httpx.Client(base_url=self.url, timeout=timeout_s, limits=limits, headers=headers)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url}: not a URL ({error})") from error

    def answer(self, prompts: Sequence[str], ask: GenerationOptions, seeds: Sequence[int]) -> list[list[Answered]]:
        """As :class:`Backend`. Greedy prompts go together, sampled ones one by one: each has its own seed.

        Raises:
            RequestError: the server refuses a request.
            EngineError: it cannot be reached or fails.
        """
        if ask.temperature == 0:
            return _grouped(self._post({"prompt": list(prompts)}, ask), 1)
        return [self._post({"prompt": p, "seed": s}, ask) for p, s in zip(prompts, seeds, strict=True)]

    def _post(self, body: dict[str, Any], ask: GenerationOptions) -> list[Answered]:
        convergence = {k: v for k, v in ask.loop.items() if k in ("criterion", "threshold", "patience")}
        limits = {k: v for k, v in ask.loop.items() if k not in convergence}
        options = {"max_new_tokens": ask.max_new_tokens, "temperature": ask.temperature, "n": ask.samples}
        try:
            response = self.client.post(
                "/trace", json={**body, **limits, **options, "convergence": convergence, "top_tokens": 0}
            )
            if response.status_code == 200:
                results = response.json()["results"]
                if any(result["budget_reduced"] for result in results):
                    raise EngineError(f"{self.url}: it reduced an iteration budget; --elastic-floor 1 turns that off")
                return [_from_json(result) for result in results]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url}: no usable answer ({error!r})") from error
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):  # somebody else's error: a proxy's page, another server's JSON
            message = response.reason_phrase
        kind = RequestError if 400 <= response.status_code < 500 else EngineError
        raise kind(f"{self.url}: {response.status_code}, {message}")


def _from_json(result: dict[str, Any]) -> Answered:
    usage, stability = result["usage"], result["stability"]
    return Answered(
        text=result["text"],
        iterations=result["iterations"],
        exit_reason=result["exit_reason"],
        relative_change=tuple(record["relative_change"] for record in result["trace"]),
        contraction_rate=stability["contraction_rate"],
        oscillating=stability["oscillating"],
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"],
        forward_passes=usage["forward_passes"],
    )


def _grouped(answered: list[Answered], size: int) -> list[list[Answered]]:
    return [answered[i : i + size] for i in range(0, len(answered), size)]
