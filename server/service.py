"""The engine's life inside the server, and the way of a request through it."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from server.admission import Admission
from server.errors import TimedOut, Unavailable
from server.metrics import Metrics
from server.plan import check_limits, count, plan
from server.schemas import GenerateRequest
from server.settings import Settings
from slr_core.describe import describe
from slr_core.engine import Engine
from slr_core.errors import EngineError
from slr_core.generation import Request, Result

logger = logging.getLogger(__name__)


class Service:
    """Holds the engine from startup to shutdown; an async context manager.

    Args:
        settings: the server's settings.
        engine: a running engine, which stays its owner's to close; by default one is built from
            ``settings.model`` in a thread, and requests are refused until it is there.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.failure: Exception | None = None
        """Why the model could not be loaded."""
        self._engine = engine
        self._owned = engine is None
        self.loading: asyncio.Task[None] | None = None
        """Ends when the model is there, or :attr:`failure` is."""
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
            await asyncio.to_thread(self._engine.close)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._engine is not None and self._engine.alive

    def check(self) -> Engine:
        """The engine, if it can be expected to answer.

        Raises:
            Unavailable: it is loading, stopped, or has made no progress for as long as a request may take.
        """
        if self.failure is not None:
            raise Unavailable("the model could not be loaded")
        if self._engine is None:
            raise Unavailable("the model is still loading")
        if not self._engine.alive:
            raise Unavailable("the engine is stopped")
        if self._engine.stalled_s() > self.settings.request_timeout_s:
            raise Unavailable("the engine makes no progress")
        return self._engine

    async def answer(self, body: GenerateRequest) -> list[Result]:
        """Answer every prompt of a body, ``n`` times each. Cancelling drops what has not begun.

        Raises:
            RequestError: the body cannot be run.
            QueueFull: there is no room for all of it.
            Unavailable: there is no engine to run it.
            TimedOut: it took too long.
            EngineError: the engine failed on it.
        """
        check_limits(body, self.settings)
        engine = self.check()
        limit = self.settings.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                with self._admission.reserve(count(body)):
                    requests = await asyncio.get_running_loop().run_in_executor(
                        self._tokenizing, plan, engine.reasoner, body, self.settings, engine.capacity
                    )
                    futures = self._submit(engine, requests)
                return await _gather(futures)
        except TimeoutError as error:
            raise TimedOut(f"no answer within {limit:g} seconds") from error
        except EngineError as error:
            if not engine.alive:
                raise Unavailable("the engine is stopped") from error
            raise

    def _submit(self, engine: Engine, requests: list[Request]) -> list[Future[Result]]:
        futures: list[Future[Result]] = []
        try:
            for request in requests:
                futures.append(engine.submit(request))
                # Counted where the engine ends it, and not where an answer is awaited: the work was done even if
                # its client has left by then.
                self.metrics.follow(request, futures[-1])
                futures[-1].add_done_callback(self._finished)
        except EngineError:
            for future in futures:
                future.cancel()
            raise
        return futures

    def _finished(self, future: Future[Result]) -> None:
        if not future.cancelled():
            self._admission.finished()

    async def _load(self) -> None:
        began = time.monotonic()
        try:
            self._engine = await asyncio.to_thread(self._build)
        except Exception as error:  # whatever it is, the process must hear of it: see server.cli
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
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        settings = self.settings
        return Engine.from_pretrained(settings.model, slots=settings.slots, on_step=self.metrics.stepped)

    def _queued(self) -> int:
        return 0 if self._engine is None else self._engine.queued


async def _gather(futures: list[Future[Result]]) -> list[Result]:
    waiting = [asyncio.wrap_future(future) for future in futures]
    try:
        return await asyncio.gather(*waiting)
    finally:
        # After a failure the other answers have no reader: cancelling drops those that still wait.
        for future in waiting:
            future.cancel()
