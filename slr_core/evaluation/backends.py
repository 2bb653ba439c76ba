"""Backends that answer prompts: a model in this process, or a server."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import httpx

from slr_core.client import Client
from slr_core.engine import Engine
from slr_core.errors import EngineError, RequestError
from slr_core.evaluation.cost import Cost
from slr_core.evaluation.outcomes import MethodAnswer
from slr_core.generation.prepare import prepare
from slr_core.generation.reference import RunLoop, generate
from slr_core.params import LoopParams, SamplingParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Request

SLOTS = 64
"""Number of questions that the engine answers at once; the memory of its cache does not depend on it."""


@dataclass(frozen=True)
class GenerationOptions:
    """How a method wants its prompts answered.

    Attributes:
        loop: fields of :class:`~slr_core.params.LoopParams`; the checkpoint supplies the others.
        max_new_tokens: maximum length of an answer; ``None``: the checkpoint's default. A model in this process lowers
            it to what fits.
        temperature: sampling temperature; 0 is greedy.
        samples: number of answers per prompt.
    """

    loop: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float = 0.0
    samples: int = 1


class Backend(Protocol):
    """Answers prompts.

    Attributes:
        batches_at_once: number of threads that may call :meth:`answer` at the same time; that many batches keep the
            backend busy.
    """

    batches_at_once: int

    def answer(
        self, prompts: Sequence[str], options: GenerationOptions, seeds: Sequence[int]
    ) -> list[list[MethodAnswer]]:
        """``options.samples`` answers per prompt; sample j of prompt i has the seed ``seeds[i] + j``."""
        ...


class Local:
    """A model in this process, run by the engine.

    Args:
        reasoner: the model.
        threads: as of :class:`~slr_core.engine.Engine`.
    """

    batches_at_once = 4

    def __init__(self, reasoner: LatentReasoner, threads: int | None = None) -> None:
        self.reasoner, self.cost, self._threads = reasoner, Cost(reasoner), threads
        self._starting = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine. It starts on first use and is closed with this backend."""
        with self._starting:
            return self._engine

    @property
    def rows_per_step(self) -> float | None:
        """Mean number of rows in the engine's steps; ``None`` if the engine was not used."""
        counters = self.engine.counters if "_engine" in vars(self) else None
        return counters.row_steps / counters.steps if counters and counters.steps else None

    @cached_property
    def _engine(self) -> Engine:
        # No prefix cache: otherwise the second method to answer a prompt would be faster.
        engine = Engine(self.reasoner, slots=SLOTS, prefix_gib=0, threads=self._threads)
        weakref.finalize(self, engine.close)
        return engine

    def answer(
        self, prompts: Sequence[str], options: GenerationOptions, seeds: Sequence[int], run_loop: RunLoop | None = None
    ) -> list[list[MethodAnswer]]:
        """As :meth:`Backend.answer`.

        Args:
            prompts: to answer.
            options: how to answer.
            seeds: one per prompt.
            run_loop: replaces the loop; its rows are ordered by prompt, then by sample. The reference implementation
                then runs instead of the engine, and no other thread may use the model.
        """
        requests = [
            self.request(prompt, options, seed + sample)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for sample in range(options.samples)
        ]
        if run_loop is None:
            results = [future.result() for future in [self.engine.submit(request) for request in requests]]
        else:
            results = generate(self.reasoner, requests, run_loop=run_loop)
        cost, added = self.cost.request, self.cost.added_parameters
        answered = [
            MethodAnswer.from_result(r, cost(r.prompt_tokens, r.iterations, r.completion_tokens), added)
            for r in results
        ]
        return _grouped(answered, options.samples)

    def request(self, prompt: str, options: GenerationOptions, seed: int) -> Request:
        """The request for one answer, with ``max_new_tokens`` lowered to what fits.

        Raises:
            RequestError: nothing fits.
        """
        sampling = SamplingParams(options.temperature, seed=seed)
        request = prepare(self.reasoner, prompt, LoopParams(**options.loop), sampling=sampling)
        if options.max_new_tokens is None:
            return request
        taken = self.reasoner.workspace.loop_positions(request.loop.max_iterations) + len(request.answer_prefix_ids)
        fits = self.reasoner.max_positions - len(request.prompt_ids) - taken
        return replace(request, max_new_tokens=min(options.max_new_tokens, fits))


class Remote:
    """A running server. Batches are sent to ``POST /trace``, one at a time.

    Args:
        url: the server's URL.
        api_key: an API key of the server.
        timeout_s: longest time in seconds for a batch.
        transport: replaces the network.

    Raises:
        ConfigError: ``url`` is not a URL.
    """

    batches_at_once = 1

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.client = Client(self.url, api_key=api_key, timeout_s=timeout_s, transport=transport)
        weakref.finalize(self, self.client.close)

    def answer(
        self, prompts: Sequence[str], options: GenerationOptions, seeds: Sequence[int]
    ) -> list[list[MethodAnswer]]:
        """As :meth:`Backend.answer`. Greedy prompts share a request; each sampled prompt has a request and a seed.

        Raises:
            RequestError: the server refuses a request.
            EngineError: it cannot be reached or fails.
        """
        if options.temperature == 0:
            return _grouped(self._trace(list(prompts), None, options), 1)
        return [self._trace(prompt, seed, options) for prompt, seed in zip(prompts, seeds, strict=True)]

    def identify(self) -> dict[str, Any]:
        """URL, hash of the served checkpoint and precision of its weights; a model of the hub has no hash.

        Raises:
            RequestError: the server refuses the request.
            EngineError: it cannot be reached or fails.
        """
        with self._naming_errors():
            identity = self.client.identity()
            known = {key: identity[key] for key in ("sha256", "dtype", "quantization")}
            return {"name": self.url, **{key: value for key, value in known.items() if value is not None}}

    def _trace(self, prompt: str | list[str], seed: int | None, options: GenerationOptions) -> list[MethodAnswer]:
        convergence = {k: v for k, v in options.loop.items() if k in ("criterion", "threshold", "patience")}
        fields: dict[str, Any] = {k: v for k, v in options.loop.items() if k not in convergence}
        fields |= {
            "convergence": convergence,
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "n": options.samples,
            "seed": seed,
            "top_tokens": 0,
        }
        with self._naming_errors():
            results = self.client.trace(prompt, **fields)["results"]
            if any(result["budget_reduced"] for result in results):
                raise EngineError("the server reduced an iteration budget; its option --elastic-floor 1 turns that off")
            return [_from_json(result) for result in results]

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            raise RequestError(f"{self.url}: {error}", error.param) from error
        except EngineError as error:
            raise EngineError(f"{self.url}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{self.url}: unexpected answer ({error!r})") from error


def _from_json(result: dict[str, Any]) -> MethodAnswer:
    usage, stability = result["usage"], result["stability"]
    return MethodAnswer(
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


def _grouped(answered: list[MethodAnswer], size: int) -> list[list[MethodAnswer]]:
    return [answered[i : i + size] for i in range(0, len(answered), size)]
