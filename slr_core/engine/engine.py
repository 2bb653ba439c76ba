"""A simple batching engine: what waits is run together, until the last row is done."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from slr_core.errors import ConfigError, EngineError, SLRError
from slr_core.generation import Request, Result, generate, prepare
from slr_core.loop.convergence import LoopSettings
from slr_core.model import LatentReasoner

logger = logging.getLogger(__name__)

Waiting = tuple[Request, Future[Result], float]
"""A request, where its result goes, and since when it waits (``time.perf_counter``)."""


class Engine:
    """Runs requests of any settings in batches on one thread of its own.

    Waiting requests are taken first come first served, at most ``max_batch`` at a time. A batch that fails
    is run again row by row: the row at fault fails alone, and the engine goes on. Use as a context manager,
    or :meth:`close` it.

    Args:
        reasoner: the model, in eval mode; nothing else may run it while the engine lives.
        max_batch: most requests in one batch.

    Raises:
        ConfigError: ``max_batch`` is below 1.
    """

    def __init__(self, reasoner: LatentReasoner, *, max_batch: int = 32) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
        self.reasoner = reasoner
        self.max_batch = max_batch
        self.last_progress = time.monotonic()
        """When the engine last finished a batch, or had nothing to do (``time.monotonic``)."""
        self._waiting: deque[Waiting] = deque()
        self._running = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="slr-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(cls, path_or_id: str | None = None, *, max_batch: int = 32, **options: Any) -> Self:
        """Load a checkpoint (by default the bundled one) and start an engine on it.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
        """
        return cls(LatentReasoner.from_pretrained(path_or_id, **options), max_batch=max_batch)

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request; the future gives its result, and cancelling it before it runs drops it.

        Raises:
            EngineError: the engine is closed.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise EngineError("the engine is shut down")
            if not self._waiting and not self._running:
                self.last_progress = time.monotonic()
            self._waiting.append((request, future, time.perf_counter()))
            self._changed.notify()
        return future

    def generate(self, prompts: str | Sequence[str], *, max_new_tokens: int | None = None, **loop: Any) -> list[Result]:
        """Answer prompts, batched; ``loop`` takes the arguments of :meth:`LoopSettings.resolve`.

        Raises:
            RequestError: a prompt or a setting cannot be run.
        """
        settings = LoopSettings.resolve(self.reasoner.config.loop, **loop)
        requests = [
            prepare(self.reasoner, prompt, settings, max_new_tokens=max_new_tokens)
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        return [future.result() for future in [self.submit(request) for request in requests]]

    @property
    def queued(self) -> int:
        """Requests that wait and that somebody still waits for."""
        with self._changed:
            return sum(not future.cancelled() for _, future, _ in self._waiting)

    @property
    def in_flight(self) -> int:
        """Requests in the batch that runs now."""
        return self._running

    @property
    def alive(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self._thread.is_alive() and not self._closed

    def stalled_s(self) -> float:
        """Seconds without progress while work is pending; 0 when idle."""
        idle = not self._waiting and not self._running
        return 0.0 if idle else time.monotonic() - self.last_progress

    def close(self, timeout: float | None = None) -> None:
        """Finish the running batch, refuse what waits, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._run_batch(batch)
            finally:
                with self._changed:
                    self._running = 0
                    self.last_progress = time.monotonic()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for _, future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineError("the engine is shut down"))

    def _next_batch(self) -> list[Waiting]:
        """The requests to run next; empty once the engine is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                batch: list[Waiting] = []
                while self._waiting and len(batch) < self.max_batch:
                    entry = self._waiting.popleft()
                    if entry[1].set_running_or_notify_cancel():
                        batch.append(entry)
                if batch:
                    self._running = len(batch)
                    return batch

    def _run_batch(self, batch: list[Waiting]) -> None:
        now = time.perf_counter()
        try:
            results = generate(
                self.reasoner, [request for request, _, _ in batch], queued_s=[now - since for _, _, since in batch]
            )
        except Exception as error:  # whatever it is, its requests must hear of it and the engine must go on
            if len(batch) > 1:
                logger.warning("a batch of %d requests failed (%r), running each alone", len(batch), error)
                for entry in batch:
                    self._run_batch([entry])
                    self.last_progress = time.monotonic()
                return
            logger.exception("a request failed")
            ours = isinstance(error, SLRError)
            batch[0][1].set_exception(error if ours else EngineError(f"the request failed: {error}"))
            return
        for (_, future, _), result in zip(batch, results, strict=True):
            future.set_result(result)
