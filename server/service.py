"""The engine's lifetime inside the server, and the path of a request through it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

from slr_core.checkpoint.info import describe_model
from slr_core.engine import DEFAULT_LOOP_SET, Engine, FinishedEvent
from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.errors import EngineError, RequestError
from slr_core.types import Request, Result

from .adapter_sets import AdapterSetFolder
from .admission import Admission, reduce_budget
from .errors import SHUTTING_DOWN, Conflict, ModelNotFound, Unavailable
from .loading import build_engine
from .loop_lag import LoopLag
from .observability.exposition import Exposition
from .observability.metrics import Metrics
from .observability.request_stats import RequestStats
from .overload import RequestLimit
from .preprocess import GenerationJob, check_characters, preprocess
from .protocol.operation import CheckpointFacts
from .protocol.schema import Answer, OutputEvent
from .request_group import AdmittedRequest, RequestGroup, until_deadline
from .settings import ServerSettings
from .threads import SerialWorker, run_in_daemon
from .tokenizer_pool import TokenizerPool

logger = logging.getLogger(__name__)


class Service:
    """Owns the engine from startup to shutdown; an async context manager.

    Args:
        settings: the server's settings.
        engine: a running engine, which the caller closes. ``None``: one is built from ``settings.model`` in a
            thread, and requests are refused until it has given a first answer.
    """

    def __init__(self, settings: ServerSettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        """Why the model could not be loaded, or why the engine ended."""
        self._engine = engine
        self._owned = engine is None
        self.loading: asyncio.Task[None] | None = None
        """Done when the model is loaded or :attr:`failure` is set."""
        self.draining: asyncio.Task[None] | None = None
        """Done when no request is left; see :meth:`drain`."""
        self._drain_until = math.inf
        """``time.monotonic`` until which running requests may finish."""
        self._closed = False
        self._groups: set[RequestGroup] = set()
        self._loads: set[asyncio.Task[None]] = set()
        """Loads of loop adapter sets."""
        self._folder = AdapterSetFolder(settings.loop_sets, settings.load_timeout_s)
        self.checkpoint_facts: asyncio.Task[CheckpointFacts] | None = None
        """Read for the first client that asks."""
        self.checkpoint_sha256: asyncio.Task[str | None] | None = None
        """Computed for the first client that asks."""
        self.created = int(time.time())
        """Unix time in seconds at which the server started."""
        self.tokenizers, self.loop_lag = TokenizerPool(), LoopLag()
        self.encoder, self.grader = SerialWorker(), SerialWorker()
        self._admission = Admission(settings.max_queue, self._queued, running=self._running)
        # More can be in progress than the engine takes while answers are tokenized, encoded and sent.
        self.requests = RequestLimit(
            settings.max_requests or 2 * (settings.slots + settings.max_queue), self._admission
        )
        self.metrics = Metrics(settings.model_name)
        self.exposition = Exposition(self.metrics.registry)
        self.metrics.watch_lags(lambda: self.tokenizers.lag_s, lambda: self.loop_lag.seconds)
        if engine is not None:
            self.metrics.watch(engine)

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self.loop_lag.watch())
        if self._engine is None:
            self.loading = asyncio.create_task(self._load())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread cannot be interrupted: an engine that is still loading is closed once it has loaded.
        self._closed = True
        if self.loading is not None and not self.loading.done():
            self.loading.cancel()
            await asyncio.wait((self.loading,))
        if self._engine is not None and self._owned:
            # The time limit lets the process end although a step hangs.
            await run_in_daemon(partial(self._engine.close, self.settings.stall_timeout_s))
        self.tokenizers.close()
        self._watching.cancel()

    # -- state --------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether the model is loaded and has given a first answer."""
        return self._engine is not None

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._engine is not None and self._engine.alive and self.draining is None

    @property
    def broken(self) -> bool:
        """Whether the engine has failed and cannot recover."""
        return self._engine is not None and self._owned and not self._engine.alive and self.draining is None

    @property
    def stalled(self) -> bool:
        """Whether work is pending and no step has finished within the time limit."""
        return self._engine is not None and self._engine.stalled_s() > self.settings.stall_timeout_s

    def check(self) -> Engine:
        """The engine, if it accepts requests.

        Raises:
            Unavailable: it is loading, stopped or stalled, no prompt is tokenized, or the server is shutting down.
        """
        if self.failure is not None:
            raise Unavailable("the model could not be loaded")
        if self._engine is None:
            raise Unavailable("the model is still loading")
        self.check_not_draining()
        if not self._engine.alive:
            raise Unavailable("the engine is stopped")
        if self.stalled:
            raise Unavailable("the engine makes no progress")
        if self.tokenizers.waiting_s > self.settings.stall_timeout_s:
            raise Unavailable("the tokenizer makes no progress")
        return self._engine

    def check_not_draining(self) -> None:
        """Check that new requests are accepted, of those that need no engine.

        Raises:
            Unavailable: the server is shutting down.
        """
        if self.draining is not None:
            raise Unavailable(SHUTTING_DOWN)

    def deadline(self, stats: RequestStats) -> float:
        """``time.monotonic`` at which an HTTP request exceeds its time limit."""
        return stats.arrived_at + self.settings.request_timeout_s

    # -- loop adapter sets --------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """Names of the loaded loop adapter sets: the served model's own first, under the model's name.

        Raises:
            Unavailable: there is no engine.
        """
        others = sorted(name for name in self.check().loop_sets if name != DEFAULT_LOOP_SET)
        return [self.settings.model_name, *others]

    def check_model(self, name: str | None) -> None:
        """Check that a loop adapter set of this name is loaded.

        Raises:
            ModelNotFound: there is none.
            Unavailable: there is no engine.
        """
        if name is not None and name not in self.model_names():
            raise ModelNotFound(f"there is no model {name!r}; GET /v1/models lists them", param="model")

    def find_loop_set(self, name: str | None) -> LoopAdapterSet:
        """The loop adapter set of this name; ``None``: the served model's own.

        Raises:
            RequestError: there is none.
            Unavailable: there is no engine.
        """
        names, sets = self.model_names(), self.check().loop_sets
        if name is None or name == names[0]:
            return sets[DEFAULT_LOOP_SET]
        found = sets.get(name) if name in names else None
        if found is None:
            raise RequestError(f"loop_set must be one of {', '.join(names)}, got {name}", param="loop_set")
        return found

    def name_of(self, loop_set: LoopAdapterSet) -> str:
        """The name under which clients know a loop adapter set."""
        return self.settings.model_name if loop_set.name == DEFAULT_LOOP_SET else loop_set.name

    async def available_loop_sets(self) -> list[str]:
        """Names in the operator's folder."""
        return await asyncio.to_thread(self._folder.available)

    async def load_loop_set(self, name: str) -> None:
        """Load a loop adapter set from the operator's folder.

        Raises:
            NotFound: the folder has none of this name.
            Conflict: the name is taken, or the checkpoint does not fit the served base model.
            Unavailable: there is no engine.
        """
        engine = self.check()
        if name in (self.settings.model_name, DEFAULT_LOOP_SET):
            raise Conflict(f"the name {name!r} is reserved for the served model")
        load = asyncio.ensure_future(self._folder.load(engine, name))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        try:
            await load
        except asyncio.CancelledError:
            if self.draining is None:
                raise
            raise Unavailable(SHUTTING_DOWN) from None
        self._warn_if_untrained(name)

    async def remove_loop_set(self, name: str) -> None:
        """Remove a loaded loop adapter set.

        Raises:
            NotFound: there is none of this name.
            Conflict: it is the served model's own.
            Unavailable: there is no engine.
        """
        engine = self.check()
        if name in (self.settings.model_name, DEFAULT_LOOP_SET):
            raise Conflict("the served model's own loop adapter set cannot be removed")
        await self._folder.remove(engine, name)

    # -- a request ----------------------------------------------------------------------------------

    async def answer(self, job: GenerationJob, loop_set: LoopAdapterSet, stats: RequestStats) -> list[Answer]:
        """All answers in order.

        Args:
            job: what is asked for; :func:`slr_server.preprocess.check_limits` accepts it.
            loop_set: runs it.
            stats: of the HTTP request; filled in.

        Raises:
            RequestError: the job cannot be run.
            QueueFull: the queue has no room for all answers.
            Unavailable: there is no engine to run it.
            TimedOut: it exceeded its time limit.
            EngineError: the engine failed on it.
        """
        answers: dict[int, Answer] = {}
        async with aclosing(self.stream(job, loop_set, stats)) as outputs:
            async for index, request, event, budget_reduced in outputs:
                assert isinstance(event, FinishedEvent)
                answers[index] = Answer(request, event.result, budget_reduced)
        return [answers[index] for index in range(job.answers)]

    async def stream(
        self, job: GenerationJob, loop_set: LoopAdapterSet, stats: RequestStats
    ) -> AsyncGenerator[OutputEvent]:
        """Events of the answers as they happen: results only, unless ``job.stream``. Otherwise as :meth:`answer`."""
        engine = self.check()
        stats.answers, stats.stream, stats.loop_set = job.answers, job.stream, self.name_of(loop_set)
        try:
            async with self._submit(engine, job, loop_set, self.deadline(stats)) as (group, reduced):
                stats.reduced = reduced
                async for output in group:
                    if isinstance(output.event, FinishedEvent):
                        stats.results.append(output.event.result)
                    yield output
        except EngineError as error:
            if not engine.alive:
                raise Unavailable("the engine is stopped") from error
            raise

    @asynccontextmanager
    async def _submit(
        self, engine: Engine, job: GenerationJob, loop_set: LoopAdapterSet, deadline: float
    ) -> AsyncIterator[tuple[RequestGroup, int]]:
        """Run a job while the context lasts; with the number of answers whose iteration budget was reduced."""
        limit = self.settings.request_timeout_s
        characters = check_characters(job, self.settings, engine.capacity)
        depth = self._admission.depth(self.settings.elastic_floor, job.answers)
        with ExitStack() as stack:
            stack.enter_context(self._admission.reserve(job.answers))
            with job.names.in_errors():
                # The set may be replaced under its name while the prompts are tokenized.
                stack.enter_context(engine.lease_loop_set(loop_set))
            work = partial(preprocess, job, self.settings, loop_set.reasoner, engine.capacity)
            async with until_deadline(deadline, limit):
                requests = await self.tokenizers.run(work, characters)
            self.check()  # the server may be shutting down by now
            budgeted = [reduce_budget(request, depth) for request in requests]
            admitted = [AdmittedRequest(new, new is not old) for new, old in zip(budgeted, requests, strict=True)]
            with job.names.in_errors():
                group = RequestGroup(
                    engine,
                    admitted,
                    loop_set=loop_set,
                    stream=job.stream,
                    deadline=deadline,
                    limit_s=limit,
                    on_done=self._on_done,
                )
        reduced = sum(request.budget_reduced for request in admitted)
        self.metrics.budget_reduced(reduced)
        self._groups.add(group)
        try:
            with group:
                yield group, reduced
        finally:
            self._groups.discard(group)

    def _on_done(self, request: Request, future: Future[Result]) -> None:
        # Recorded on the thread that ends the request, so that it counts although its client may have disconnected.
        self.metrics.record(request, future)
        if not future.cancelled():
            self._admission.record_finished()

    # -- startup and shutdown -----------------------------------------------------------------------

    def load(self) -> None:
        """Load the model in this thread, for a host that starts the application once the model is loaded.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            ConfigError: an option cannot be used.
        """
        self._engine = self._build()
        self.metrics.watch(self._engine)
        self._warn_if_untrained(DEFAULT_LOOP_SET)

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            self._engine = await run_in_daemon(self._build)
        except Exception as error:  # of any kind: the process ends with it, see slr_server.cli
            self.failure = error
            return
        self.metrics.watch(self._engine)
        logger.info(
            "loaded model %s in %.1f s: %s",
            self.settings.model_name,
            time.monotonic() - started,
            describe_model(self._engine.reasoner).sizes,
        )
        self._warn_if_untrained(DEFAULT_LOOP_SET)

    def _warn_if_untrained(self, name: str) -> None:
        loop_set = self.check().loop_sets[name]
        if not loop_set.reasoner.config.trained:
            logger.warning(
                "the loop of %s is untrained: requests that set no loop parameter are answered by the base model",
                self.name_of(loop_set),
            )

    def _build(self) -> Engine:
        engine = build_engine(self.settings, self.metrics)
        if self._closed:  # nobody waits for it any more
            engine.close()
        return engine

    def drain(self) -> None:
        """Refuse new and waiting requests, give up loads of loop adapter sets, and let running requests finish within
        the grace period. Call it once."""
        self._drain_until = time.monotonic() + self.settings.grace_s
        self.draining = asyncio.create_task(self._drain())

    def end_now(self) -> None:
        """End the grace period."""
        self._drain_until = 0.0

    async def _drain(self) -> None:
        error = Unavailable(SHUTTING_DOWN)
        logger.info("shutting down: %d requests in progress", len(self._groups))
        for load in list(self._loads):
            load.cancel()
        for group in list(self._groups):
            if not group.started:
                group.fail(error)
        # Answers that are encoded no longer belong to a group.
        while (self._groups or self.encoder.awaited or self.grader.awaited) and time.monotonic() < self._drain_until:
            await asyncio.sleep(0.02)
        for group in list(self._groups):
            group.fail(error)

    def _queued(self, most_per_request: int) -> int:
        return 0 if self._engine is None else self._engine.count_queued(most_per_request)

    def _running(self) -> int:
        return 0 if self._engine is None else self._engine.in_flight
