"""The engine's life inside the server, and the way of a request through it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from slr_core.checkpoint.info import describe
from slr_core.engine import DEFAULT_LOOP_SET, Engine, FinishedEvent
from slr_core.errors import EngineError, RequestError
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import LoopParams, SamplingParams
from slr_core.types import Request, Result

from .adapter_sets import AdapterSetFolder
from .admission import Admission, reduce_budget
from .errors import Conflict, NotFound, Unavailable
from .observability.metrics import Metrics
from .observability.request_stats import current
from .protocol.native import LoopSetList
from .request_group import OutputEvent, RequestGroup, timeout_error
from .settings import Settings

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationJob:
    """What a body asks of the engine.

    Attributes:
        count: how many answers.
        plan: from a loop set's model and the positions of a slot to the requests, ``count`` of them. It
            tokenizes, so it is called in a thread.
        loop_set: whose model; ``None``: the engine's own checkpoint.
        stream: tell of iterations and tokens as well.
    """

    count: int
    plan: Callable[[LatentReasoner, int], list[Request]]
    loop_set: str | None = None
    stream: bool = False


class Service:
    """Holds the engine from startup to shutdown; an async context manager.

    Args:
        settings: the server's settings.
        engine: a running engine, which stays its owner's to close; by default one is built from
            ``settings.model`` in a thread, and requests are refused until it has given a first answer.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        """Why the model could not be loaded, or what ended the engine."""
        self._engine = engine
        self._owned = engine is None
        self.loading: asyncio.Task[None] | None = None
        """Ends when the model is there, or :attr:`failure` is."""
        self.draining: asyncio.Task[None] | None = None
        """Ends when nothing is left to answer; see :meth:`drain`."""
        self._groups: set[RequestGroup] = set()
        self._loop_sets = AdapterSetFolder(settings.loop_sets)
        self.created = int(time.time())
        """When the server started, in seconds since 1970."""
        # One thread: the cores belong to the engine.
        self._tokenizing = ThreadPoolExecutor(1, "slr-tokenize")
        self._admission = Admission(settings.max_queue, self._queued)
        self.metrics = Metrics(settings.model_name)
        if engine is not None:
            self.metrics.watch(engine)

    async def __aenter__(self) -> Self:
        if self._engine is None:
            self.loading = asyncio.create_task(self._load())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread cannot be interrupted: an engine that is still loading is closed once it is there.
        if self.loading is not None:
            await self.loading
        if self._engine is not None and self._owned:
            # A step that hangs does not keep the process from ending.
            await asyncio.to_thread(self._engine.close, self.settings.stall_timeout_s)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    # -- how it does --------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether the model has been loaded and has answered."""
        return self._engine is not None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._engine is not None and self._engine.alive and self.draining is None

    @property
    def broken(self) -> bool:
        """Whether the engine has ended by itself: it will not come back."""
        return self._engine is not None and self._owned and not self._engine.alive and self.draining is None

    @property
    def stalled(self) -> bool:
        """Whether work is pending and no step has been made for too long."""
        return self._engine is not None and self._engine.stalled_s() > self.settings.stall_timeout_s

    def check(self) -> Engine:
        """The engine, if it can be expected to answer.

        Raises:
            Unavailable: it is loading, stopped or stuck, or the server is shutting down.
        """
        if self.failure is not None:
            raise Unavailable("the model could not be loaded")
        if self._engine is None:
            raise Unavailable("the model is still loading")
        if self.draining is not None:
            raise Unavailable("the server is shutting down")
        if not self._engine.alive:
            raise Unavailable("the engine is stopped")
        if self.stalled:
            raise Unavailable("the engine makes no progress")
        return self._engine

    def loop_set_of(self, model: str | None) -> str | None:
        """The loop set that a model's name stands for; ``None`` for the served checkpoint's own.

        Raises:
            NotFound: it stands for nothing.
            Unavailable: there is no engine.
        """
        if model is None or model == self.settings.model_name:
            return None
        if model in self.check().loop_sets and model != DEFAULT_LOOP_SET:
            return model
        raise NotFound(f"there is no model {model!r}; GET /v1/models lists them", param="model")

    def models(self) -> list[str]:
        """The names that :meth:`loop_set_of` knows.

        Raises:
            Unavailable: there is no engine.
        """
        others = [name for name in self.check().loop_sets if name != DEFAULT_LOOP_SET]
        return [self.settings.model_name, *others]

    async def loop_sets(self) -> LoopSetList:
        """Those that are loaded, and those that could be."""
        loaded = sorted(self.check().loop_sets)
        return LoopSetList(loaded=loaded, available=await asyncio.to_thread(self._loop_sets.available))

    async def load_loop_set(self, name: str) -> None:
        """As :meth:`slr_server.adapter_sets.AdapterSetFolder.load`."""
        engine = self.check()
        if name == self.settings.model_name:
            raise Conflict(f"{name!r} is the served model's own name")
        await self._loop_sets.load(engine, name)

    async def remove_loop_set(self, name: str) -> None:
        """As :meth:`slr_server.adapter_sets.AdapterSetFolder.remove`."""
        await self._loop_sets.remove(self.check(), name)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what would hold up the event loop where prompts are tokenized."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    # -- a request ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def run(self, ask: GenerationJob) -> AsyncIterator[RequestGroup]:
        """Have the engine work on what is asked, for as long as the context lasts.

        Raises:
            RequestError: it cannot be run.
            QueueFull: there is no room for all of it.
            Unavailable: there is no engine to run it.
            TimedOut: it took too long.
            EngineError: the engine failed on it.
        """
        engine, stats = self.check(), current()
        stats.answers, stats.stream, stats.loop_set = ask.count, ask.stream, ask.loop_set
        limit = self.settings.request_timeout_s
        deadline = time.monotonic() + limit
        try:
            loop_set = engine.loop_sets.get(DEFAULT_LOOP_SET if ask.loop_set is None else ask.loop_set)
            if loop_set is None:
                raise RequestError(f"there is no loop set {ask.loop_set!r}", param="loop_set")
            depth = self._admission.depth(self.settings.elastic_floor)
            with self._admission.reserve(ask.count):
                try:
                    async with asyncio.timeout(limit):
                        requests = await self.in_thread(partial(ask.plan, loop_set.reasoner, engine.capacity))
                except TimeoutError as error:
                    raise timeout_error(limit) from error
                planned = [(reduce_budget(request, depth), request) for request in requests]
                group = RequestGroup(
                    engine,
                    [(runs, runs is not asked) for runs, asked in planned],
                    loop_set=ask.loop_set,
                    every=ask.stream,
                    deadline=deadline,
                    limit_s=limit,
                )
            for (request, _), future in zip(planned, group.futures, strict=True):
                self.metrics.follow(request, future)
                future.add_done_callback(self._finished)
            stats.reduced = sum(runs is not asked for runs, asked in planned)
            self.metrics.budget_reduced(stats.reduced)
            self._groups.add(group)
            try:
                with group:
                    yield group
            finally:
                self._groups.discard(group)
        except EngineError as error:
            if not engine.alive:
                raise Unavailable("the engine is stopped") from error
            raise

    async def answer(self, ask: GenerationJob) -> list[tuple[Result, bool]]:
        """Every answer in order, each with whether its iteration budget was reduced; raises as :meth:`fly`."""
        results: dict[int, tuple[Result, bool]] = {}
        async with self.run(ask) as group:
            async for outputs in group:
                assert isinstance(outputs.event, FinishedEvent)
                results[outputs.answer] = (outputs.event.result, outputs.reduced)
        return [results[index] for index in range(ask.count)]

    async def stream(self, ask: GenerationJob) -> AsyncGenerator[OutputEvent]:
        """What happens to the answers, as it happens; raises as :meth:`fly`."""
        async with self.run(ask) as group:
            async for outputs in group:
                yield outputs

    def _finished(self, future: Future[Result]) -> None:
        # Noted in the engine's thread, and not where an answer is awaited: the work was done even if its
        # client has left by now.
        if not future.cancelled():
            self._admission.finished()

    # -- its life -----------------------------------------------------------------------------------

    async def _load(self) -> None:
        began = time.monotonic()
        try:
            self._engine = await asyncio.to_thread(self._build)
        except Exception as error:  # whatever it is, the process must hear of it: see slr_server.cli
            self.failure = error
            return
        self.metrics.watch(self._engine)
        logger.info(
            "model %s loaded in %.1f s: %s",
            self.settings.model_name,
            time.monotonic() - began,
            describe(self._engine.reasoner).sizes,
        )

    def _build(self) -> Engine:
        settings = self.settings
        engine = Engine.from_pretrained(
            settings.model,
            slots=settings.slots,
            cache_gib=settings.cache_gib,
            prefix_gib=settings.prefix_gib,
            threads=settings.threads,
            static_shapes=settings.static_shapes,
            on_step=self.metrics.stepped,
        )
        try:
            engine.submit(_first_request(engine.reasoner)).result()
        except BaseException:
            engine.close()
            raise
        return engine

    def drain(self) -> None:
        """Refuse whatever comes or waits, and let what runs end within the grace period. Called once."""
        self.draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        error = Unavailable("the server is shutting down")
        logger.info("draining: %d requests are under way", len(self._groups))
        for group in list(self._groups):
            if not group.begun:
                group.abort(error)
        ends = time.monotonic() + self.settings.grace_s
        while self._groups and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        for group in list(self._groups):
            group.abort(error)

    def _queued(self) -> int:
        return 0 if self._engine is None else self._engine.queued


def _first_request(reasoner: LatentReasoner) -> Request:
    """A token's worth of everything: prefill, the loop as far as the checkpoint lets it run, a written token."""
    return Request(
        prompt_ids=(0,),
        answer_prefix_ids=(),
        loop=LoopParams().resolve(reasoner.config.loop),
        max_new_tokens=1,
        sampling=SamplingParams(),
        stop=(),
        trace=False,
        top_tokens=0,
        include_states=False,
    )
