"""The engine: continuous depth-wise batching on one thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from math import inf
from typing import Any, Self, TypeVar
from weakref import WeakSet

import torch

from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.adapter_sets import LoopAdapterSets
from slr_core.engine.core import Core
from slr_core.engine.events import Event, FinishedEvent
from slr_core.engine.prefix_cache import prefix_keys
from slr_core.engine.runner.device import (
    fastest_threads,
    load_reasoner,
    release_workers,
    restore_default_threads,
)
from slr_core.engine.runner.kv_cache import position_bytes
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.sequence import Sequence
from slr_core.engine.statistics import Counters, Step
from slr_core.errors import ConfigError, EngineError, RequestError
from slr_core.generation.decoding import DecodeState
from slr_core.generation.prepare import prepare
from slr_core.loop.convergence import ExitRule
from slr_core.loop.diagnostics import LoopTracker
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
from slr_core.types import Messages, Request, Result, Tokens

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_LOOP_SET = "default"
"""The loop set of the checkpoint that an engine starts with."""
TYPICAL_PROMPT = 16
"""Tokens of a prompt, where the adapter bank is tuned for whole prompts."""
TYPICAL_STEP = 8, 64
"""Rows of a step and columns that they read, where the number of threads is chosen."""
ABANDON_S = 10.0
"""How long an engine that was not closed may take for its last step when the process ends."""
GIB = 2**30


class Engine:
    """Runs requests of any settings together, on one thread that owns the model.

    Every step takes each request one pass forward, whatever it does: a chunk of its prompt, iteration ``t`` of
    its own loop, a token. A request that converges stops looping in that step; one that ends makes room at once.
    Use as a context manager, or :meth:`close` it.

    Args:
        reasoner: the model, in eval mode. Its weights are shared, not copied.
        slots: most requests at once.
        capacity: positions of a slot: prompt, thoughts and answer. By default what the model can address, or
            what ``cache_gib`` holds, whichever is less.
        cache_gib: memory for all slots, where ``capacity`` is not given.
        prefix_gib: memory for prompts that may come again; 0 keeps none.
        prefill_chunk: most prompt positions in one step where a prompt can be run in parts (not in the workspace
            ``prompt``): a long one holds nobody up for longer.
        threads: torch threads of the engine; by default as many as a step, measured at the start, is worth.
        static_shapes: loop and decode passes run in few fixed shapes, which a GPU replays as CUDA graphs; by default
            where there is a GPU.
        on_step: hears of every step, on the engine's thread: it must not block.

    Raises:
        ConfigError: a value is out of range, or the cache has no room for a useful slot.
    """

    def __init__(
        self,
        reasoner: LatentReasoner,
        *,
        slots: int = 32,
        capacity: int | None = None,
        cache_gib: float = 4.0,
        prefix_gib: float = 0.25,
        prefill_chunk: int = 512,
        threads: int | None = None,
        static_shapes: bool | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if prefix_gib < 0:
            raise ConfigError(f"prefix_gib must be at least 0, got {prefix_gib:g}")
        self.reasoner = reasoner
        """The model that the engine started with; it may be used meanwhile, its weights must not be changed."""
        self.slots = slots
        self.threads = threads or torch.get_num_threads()
        """Torch threads of the engine."""
        room = int(cache_gib * GIB) // (slots * position_bytes(reasoner.base))
        self.capacity = min(reasoner.max_positions, room) if capacity is None else capacity
        if self.capacity < 2:
            raise ConfigError(
                f"a slot has room for {self.capacity} positions; give `capacity`, more `cache_gib` or fewer `slots`"
            )
        self._arrived: list[Sequence] = []
        self._commands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._bank = LoraBatch(reasoner.base)
        self.model = self._bank.model
        """The base model as the engine runs it: the same weights in modules of its own."""
        self._core = Core(
            self._bank,
            slots=slots,
            capacity=self.capacity,
            prefix_bytes=int(prefix_gib * GIB),
            prefill_chunk=prefill_chunk,
            static=reasoner.device.type == "cuda" if static_shapes is None else static_shapes,
            on_step=on_step,
        )
        self._loops = LoopAdapterSets(
            self._bank, LoopAdapterSet(DEFAULT_LOOP_SET, reasoner), in_use=self._in_use, tune=self._tune
        )
        self.loop_sets = self._loops.named
        """By name, those that requests can ask for."""
        self.last_progress = time.monotonic()
        """When the engine last finished a step, or had nothing to do (``time.monotonic``)."""
        self._changed = threading.Condition()
        self._closed = self._abandoned = False
        _engines.add(self)
        self._thread = threading.Thread(target=self._run, name="slr-engine", daemon=True)
        self._thread.start()
        # Measured where it will run, while nobody else computes.
        release_workers()
        try:
            self._between_steps(lambda: self._set_up(threads))
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> Self:
        """Load a checkpoint and start an engine on it.

        Args:
            path_or_id: a folder, a hub id or the name of a bundled checkpoint. Default: ``prosqa``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto``: a GPU where there is one.
            dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or a torch dtype. ``auto``: the checkpoint's own
                where the device computes it natively, and fp32 otherwise.
            options: passed to :class:`Engine`.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            ConfigError: an option is out of range, or the device or dtype cannot be used.
        """
        reasoner = load_reasoner(path_or_id, device=device, dtype=dtype)
        return cls(reasoner, **options)

    # -- requests ----------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: str | Messages | Tokens,
        loop: LoopParams | ResolvedLoopParams | None = None,
        *,
        loop_set: str | None = None,
        **options: Any,
    ) -> Request:
        """A request that fits this engine's slots; see :func:`slr_core.generation.prepare`.

        Raises:
            RequestError: it cannot be run.
        """
        return prepare(self._loops.find(loop_set).reasoner, prompt, loop, limit=self.capacity, **options)

    def submit(
        self,
        request: Request,
        *,
        loop_set: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        deadline: float = inf,
    ) -> Future[Result]:
        """Queue a request. Cancelling the future drops it at the next step, whatever it is doing.

        Args:
            request: from :meth:`prepare`.
            loop_set: by which it was prepared; ``None``: the engine's own checkpoint.
            on_event: hears of every event, on the engine's thread: it must not block.
            deadline: ``time.monotonic`` after which the future fails with DeadlineError.

        Raises:
            EngineError: the engine is closed or has failed.
            RequestError: there is no such loop set, or the request is larger than a slot.
        """
        loops = self._loops.find(loop_set)
        reserved = loops.positions(request)
        if reserved > self.capacity:
            raise RequestError(f"the request may need {reserved} positions, a slot has {self.capacity}", param="prompt")
        sequence = Sequence(
            request=request,
            loops=loops,
            future=Future(),
            on_event=on_event,
            deadline=deadline,
            keys=prefix_keys(request.prompt_ids) if self._reuses(request, loops) else (),
            reserved=reserved,
            answer=DecodeState(loops.reasoner, request),
            row=LoopTracker(ExitRule(request.loop, loops.config.guard)),
        )
        sequence.future.add_done_callback(sequence.hear_of_end)
        with self._changed:
            self._check_open()
            if self.loop_sets.get(loops.name) is not loops:  # removed meanwhile: the bank may not hold it any longer
                raise RequestError(f"loop_set {loops.name} has been removed", "loop_set")
            if not self._arrived and not self._core.busy:
                self.last_progress = time.monotonic()
            self._arrived.append(sequence)
            self._changed.notify()
        return sequence.future

    def _reuses(self, request: Request, loops: LoopAdapterSet) -> bool:
        # What is scored has to be run.
        return loops.workspace.prefills and self._core.prefixes.max_bytes > 0 and not request.score_prompt

    async def stream(self, request: Request, **options: Any) -> AsyncIterator[Event]:
        """The events of a request as they come; leaving the iteration early drops it. Options as in :meth:`submit`.

        Raises:
            EngineError: the engine is closed or failed on it.
            RequestError: as :meth:`submit`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def hear(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        future = self.submit(request, on_event=hear, **options)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(events.put_nowait, None))
        try:
            while (event := await events.get()) is not None:
                yield event
                if isinstance(event, FinishedEvent):
                    return
            future.result()
        finally:
            future.cancel()

    def generate(
        self,
        prompts: str | Many[str],
        *,
        loop_set: str | None = None,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Many[str] = (),
        **loop: Any,
    ) -> list[Result]:
        """DecodeState prompts; for several samples of one, give it several times: it is run once.

        Args:
            prompts: one or more texts.
            loop_set: which loop answers them.
            max_new_tokens: the checkpoint's default where ``None``.
            sampling: greedy where ``None``; without a seed every answer has its own.
            stop: strings that end an answer, besides the checkpoint's.
            loop: as :meth:`LoopParams.resolve` takes it.

        Raises:
            RequestError: a prompt or a setting cannot be run.
        """
        settings = LoopParams(**loop)
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
        requests = [
            self.prepare(prompt, settings, loop_set=loop_set, **options)
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        self._refuse_own_thread()
        return [f.result() for f in [self.submit(request, loop_set=loop_set) for request in requests]]

    # -- loop sets ---------------------------------------------------------------------------------

    def load_loop_set(self, name: str, path_or_id: str) -> None:
        """Serve another checkpoint's loop on the same base model; running requests go on meanwhile.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: the name is taken, its base model is not this engine's, or its weights are not finite.
        """
        self._loops.check_free(name)
        try:
            added = LoopAdapterSet.beside(self.reasoner, name, path_or_id)
        finally:
            release_workers()
        self._between_steps(lambda: self._loops.add(added))

    def remove_loop_set(self, name: str) -> None:
        """Take no more requests for a loop set; its memory is freed once those under way are done.

        Raises:
            ConfigError: there is none of this name, or it is the engine's own.
        """
        self._loops.remove(name)
        self._between_steps(self._loops.retire)

    def _set_up(self, threads: int | None) -> None:
        default = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._loops.fill()
        if threads is None and self.model.device.type == "cpu":
            self.threads = fastest_threads(lambda: self._core.run_idle(*TYPICAL_STEP), self.threads)
            release_workers()  # as many as the most that were tried
            self._tune()
        restore_default_threads(default)

    def _tune(self) -> None:
        chosen = self._bank.tune(self.slots, self.reasoner.workspace.width(TYPICAL_PROMPT))
        logger.debug("adapter bank: %d adapters, %s", self._bank.count, chosen)

    def _in_use(self) -> set[LoopAdapterSet]:
        scheduler = self._core.scheduler
        return {sequence.loops for sequence in (*self._arrived, *scheduler.waiting, *scheduler.running)}

    def _between_steps(self, command: Callable[[], T]) -> T:
        """What ``command`` returns on the engine's thread."""
        self._refuse_own_thread()
        done: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._commands.append((command, done))
            self._changed.notify()
        return done.result()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is shut down")
        if not self._thread.is_alive():
            raise EngineError("the engine's thread is not in this process, which was forked: make an engine here")

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise EngineError("a listener runs on the engine's thread and must not wait for the engine")

    # -- how it does -------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What was done since the start."""
        return self._core.counters

    @property
    def waiting(self) -> frozenset[Future[Result]]:
        """The futures of requests that have no slot yet and that somebody still waits for."""
        with self._changed:
            waiting = [*self._arrived, *self._core.scheduler.waiting]
        return frozenset(sequence.future for sequence in waiting if not sequence.cancelled)

    @property
    def queued(self) -> int:
        """How many requests are :attr:`waiting`."""
        return len(self.waiting)

    @property
    def in_flight(self) -> int:
        """Requests that have a slot."""
        return len(self._core.scheduler.running)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self._thread.is_alive() and not self._closed

    def stalled_s(self) -> float:
        """Seconds without a step while work is pending; 0 when idle."""
        return time.monotonic() - self.last_progress if self._arrived or self._core.busy else 0.0

    # -- the thread --------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Let the running requests end, refuse those that wait, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _abandon(self) -> None:
        """Stop after the step under way, whoever waits: the process ends."""
        if self._thread.is_alive():
            self._abandoned = True
            self.close(timeout=ABANDON_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        error: Exception = EngineError("the engine is shut down")
        try:
            while self._wait_for_work():
                self._core.step()
                self.last_progress = time.monotonic()
                self._loops.retire()
        except BaseException as fault:  # a step keeps faults to their requests: this one is the engine's
            logger.exception("the engine has failed")
            error = EngineError(f"the engine has failed: {fault}")
        with self._changed:
            self._closed = True
            self._take_arrivals()
            commands, self._commands = self._commands, []
        self._core.abort(error)
        for _, done in commands:
            done.set_exception(error)

    def _wait_for_work(self) -> bool:
        """Take what has arrived, waiting while there is nothing to do; False once the engine is closed and idle."""
        while not self._abandoned:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._commands or self._closed or self._core.busy)
                self._take_arrivals()
                commands, self._commands = self._commands, []
                closed = self._closed
            for command, done in commands:
                try:
                    done.set_result(command())
                except BaseException as error:  # the caller's, who waits for it
                    done.set_exception(error)
            if closed:
                self._core.refuse_waiting(EngineError("the engine is shut down"))
            if self._core.busy:
                return True
            if closed:
                return False
        return False

    def _take_arrivals(self) -> None:
        self._core.scheduler.waiting.extend(self._arrived)
        self._arrived.clear()


_engines: WeakSet[Engine] = WeakSet()


@atexit.register
def _abandon_all() -> None:
    # A thread inside torch when the interpreter goes would abort the process, whatever its exit status was to be.
    for engine in list(_engines):
        engine._abandon()
