# Over 400 lines: the public API is one class, and most of it is documentation.
"""The engine: continuous batching over the depth of loops, on a thread of its own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterator, Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from math import inf
from queue import SimpleQueue
from typing import Any, Self

import torch

from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.adapter_sets import DEFAULT_LOOP_SET, LoopAdapterSets
from slr_core.engine.core import Core
from slr_core.engine.events import Event
from slr_core.engine.runner.device import load_reasoner, release_workers
from slr_core.engine.runner.kv_cache import position_bytes
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.statistics import EngineCounters, StepStats
from slr_core.engine.thread import EngineThread
from slr_core.engine.thread_count import ThreadCount
from slr_core.errors import ConfigError, EngineError
from slr_core.generation.prepare import prepare
from slr_core.params import LoopParams, ResolvedLoopParams, SamplingParams
from slr_core.reasoner import LatentReasoner
from slr_core.types import Messages, Request, Result, Tokens

GIB = 2**30

Prompt = str | Tokens


class Engine:
    """Serves requests with one copy of the model, on one thread that owns it.

    Every step runs one forward pass for each request: a chunk of its prompt, iteration ``t`` of its loop, or its next
    token. Use as a context manager, or :meth:`close` it.

    Args:
        reasoner: the model, in eval mode. Its weights are shared, not copied.
        slots: maximum number of requests that run at once.
        capacity: positions of a slot: prompt, loop and answer, once per key/value cache of a request. Default: what the
            model can address, or what ``cache_gib`` has room for, whichever is less.
        cache_gib: memory of all slots in GiB; ignored if ``capacity`` is given.
        prefix_gib: memory of the prefix cache in GiB; 0: no prefix cache.
        prefill_chunk: maximum number of prompt positions in one step. A long prompt is run in chunks, except in the
            workspaces ``prompt`` and ``token``.
        threads: number of torch threads. Default: the fastest count, measured at startup, and again when the step time
            has changed.
        static_shapes: run loop and decode passes in a few fixed shapes, which a GPU replays as CUDA graphs. Default:
            on a GPU.
        on_step: called after every step, on the engine's thread. It must not block.

    Attributes:
        reasoner: the model. It may be used while the engine runs, but its weights must not change.
        model: the base model as the engine runs it: the same weights in other modules.
        loop_sets: loop adapter sets that requests can choose, by name.

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
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("prefill_chunk", prefill_chunk), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if prefix_gib < 0:
            raise ConfigError(f"prefix_gib must be at least 0, got {prefix_gib:g}")
        self.reasoner, self.slots = reasoner, slots
        room = int(cache_gib * GIB) // (slots * position_bytes(reasoner.base))
        copies = reasoner.workspace.cache_copies(reasoner.config.loop.max_iterations)
        self.capacity = min(copies * reasoner.max_positions, room) if capacity is None else capacity
        if self.capacity < 2:
            raise ConfigError(f"a slot has room for {self.capacity} positions; raise `cache_gib`, or reduce `slots`")
        self._lora_batch = LoraBatch(reasoner.base)
        self.model = self._lora_batch.model
        self._core = Core(
            self._lora_batch,
            slots=slots,
            capacity=self.capacity,
            prefix_bytes=int(prefix_gib * GIB),
            prefill_chunk=prefill_chunk,
            static_shapes=reasoner.device.type == "cuda" if static_shapes is None else static_shapes,
            on_step=on_step,
        )
        self._adapter_sets = LoopAdapterSets(
            self._lora_batch,
            LoopAdapterSet(DEFAULT_LOOP_SET, reasoner),
            tuned_rows=slots,
            in_use=lambda: {sequence.adapter_set for sequence in self._thread.sequences()},
            on_unused=self._drop_unused_later,
        )
        self.loop_sets = self._adapter_sets.by_name
        self._thread_count = ThreadCount(self._core, threads, on_measured=self._adapter_sets.tune)
        self._thread = EngineThread(self._core, after_step=self._after_step)
        # Measured on the thread that will run the steps, while no other thread computes.
        release_workers()
        try:
            self._thread.call(self._set_up)
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
        quantization: str = "none",
        **options: Any,
    ) -> Self:
        """Load a checkpoint and start an engine on it.

        Args:
            path_or_id: a folder, a hub id or the name of a bundled checkpoint. Default: ``prosqa``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto``: a GPU where there is one.
            dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or a torch dtype. ``auto``: the checkpoint's own
                where the device computes it natively, and fp32 otherwise.
            quantization: ``none``, ``int8`` or ``int4``: how the weights of linear layers are rounded, on a CPU.
            options: passed to :class:`Engine`.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            ConfigError: an option is out of range, or the device, dtype or quantization cannot be used.
        """
        reasoner = load_reasoner(path_or_id, device=device, dtype=dtype, quantization=quantization)
        return cls(reasoner, **options)

    # -- answers -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer prompts, and wait for the results. Ctrl-C and any other exception cancel what still runs.

        For several samples of one prompt, give it several times: it is prefilled once.

        Args:
            prompts: one or more texts, which get the checkpoint's prompt prefix and suffix, or tokens.
            sampling_params: ``None``: greedy. Without a seed every answer is sampled differently.
            loop_params: fields that are unset take the checkpoint's defaults.
            options: ``max_new_tokens``, ``stop``, ``loop_set`` and others of :meth:`prepare`; ``deadline`` as in
                :meth:`submit`.

        Raises:
            RequestError: a prompt or a parameter cannot be run. Nothing has run then.
            EngineError: the engine is closed or has failed, or the deadline has passed.
        """
        with self._submitted(_as_list(prompts), sampling_params, loop_params, **options) as futures:
            return [future.result() for future in futures]

    async def agenerate(
        self,
        prompts: Prompt | Rows[Prompt],
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        **options: Any,
    ) -> list[Result]:
        """As :meth:`generate`, without blocking the event loop. Cancelling the task cancels what still runs."""
        with self._submitted(_as_list(prompts), sampling_params, loop_params, **options) as futures:
            return await asyncio.gather(*map(asyncio.wrap_future, futures))

    def chat(
        self,
        messages: Messages | Rows[Messages],
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        **options: Any,
    ) -> list[Result]:
        """As :meth:`generate`, for one chat or a list of chats, with the checkpoint's chat template.

        ``messages`` are ``{"role": ..., "content": ...}`` each.
        """
        chats: Any = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        with self._submitted(chats, sampling_params, loop_params, **options) as futures:
            return [future.result() for future in futures]

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        **options: Any,
    ) -> Generator[Event, None, None]:
        """Yield the events of a text, tokens or a chat as they come, a :class:`FinishedEvent` last.

        Parameters and errors are those of :meth:`generate`. Ctrl-C, and leaving the iteration, cancel the request.
        """
        events: SimpleQueue[Event | None] = SimpleQueue()
        with self._submitted([prompt], sampling_params, loop_params, on_event=events.put, **options) as (future,):
            future.add_done_callback(lambda _: events.put(None))
            while (event := events.get()) is not None:
                yield event
            future.result()

    async def astream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | None = None,
        **options: Any,
    ) -> AsyncGenerator[Event, None]:
        """As :meth:`stream`, without blocking the event loop. Cancelling the task cancels the request."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def put(event: Event | None) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._submitted([prompt], sampling_params, loop_params, on_event=put, **options) as (future,):
            future.add_done_callback(lambda _: put(None))
            while (event := await events.get()) is not None:
                yield event
            future.result()

    @contextmanager
    def _submitted(
        self,
        prompts: Rows[Prompt | Messages],
        *params: Any,
        loop_set: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        deadline: float = inf,
        **options: Any,
    ) -> Iterator[list[Future[Result]]]:
        """Submit prompts, unless one of them cannot run. At the end of the context, cancel what still runs."""
        self._thread.check_may_wait()
        futures: list[Future[Result]] = []
        try:
            with self.lease_loop_set(loop_set) as adapter_set:
                requests = [self.prepare(prompt, *params, loop_set=adapter_set, **options) for prompt in prompts]
                submit = partial(self.submit, loop_set=adapter_set, on_event=on_event, deadline=deadline)
                group = object()
                for request in requests:
                    futures.append(submit(request, group=group))
            yield futures
        finally:
            for future in futures:
                future.cancel()

    # -- single requests ---------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        loop_params: LoopParams | ResolvedLoopParams | None = None,
        *,
        loop_set: str | LoopAdapterSet | None = None,
        **options: Any,
    ) -> Request:
        """Tokenize a prompt and check that the request fits a slot.

        Args:
            prompt: a text, a chat or tokens.
            sampling_params: ``None``: greedy.
            loop_params: fields that are unset take the checkpoint's defaults.
            loop_set: the loop adapter set or its name; ``None``: the one that the engine started with.
            options: others of :func:`slr_core.generation.prepare.prepare`.

        Raises:
            RequestError: the request cannot be run.
        """
        self._thread.check_process()
        reasoner = (loop_set if isinstance(loop_set, LoopAdapterSet) else self._adapter_sets.find(loop_set)).reasoner
        return prepare(reasoner, prompt, loop_params, sampling=sampling_params, limit=self.capacity, **options)

    def submit(
        self,
        request: Request,
        *,
        loop_set: str | LoopAdapterSet | None = None,
        on_event: Callable[[Event], None] | None = None,
        deadline: float = inf,
        group: Hashable = None,
    ) -> Future[Result]:
        """Queue a request. Cancelling the future drops it at the next step, in whatever phase it is.

        Args:
            request: from :meth:`prepare`.
            loop_set: the loop adapter set for which it was prepared, or its name. A name may stand for another set
                by now, unless the set is leased from :meth:`prepare` until here: see :meth:`lease_loop_set`.
            on_event: called with every event, on the engine's thread. It must not block.
            deadline: ``time.monotonic`` at which the future fails with DeadlineError.
            group: any value; requests that are submitted with the same one share their turns in the queue, so that
                many of them do not delay others. ``None``: the request has its own turn.

        Raises:
            EngineError: the engine is closed or has failed.
            RequestError: there is no such loop adapter set, it has been removed, or the request is larger than a slot.
        """
        with self.lease_loop_set(loop_set) as adapter_set:
            sequence = self._core.new_sequence(request, adapter_set, on_event=on_event, deadline=deadline, group=group)
            self._thread.submit(sequence)
        return sequence.future

    # -- loop adapter sets -------------------------------------------------------------------------

    def lease_loop_set(self, loop_set: str | LoopAdapterSet | None) -> AbstractContextManager[LoopAdapterSet]:
        """A context that yields a loop adapter set and keeps it usable, even if it is removed meanwhile.

        Requests that are prepared and submitted inside, with the yielded set, run on the set they were prepared for.

        Args:
            loop_set: a name, one of :attr:`loop_sets`, or ``None`` for the one that the engine started with.

        Raises:
            RequestError: there is none of this name, or the set has been removed.
        """
        self._thread.check_process()
        return self._adapter_sets.lease(loop_set)

    def load_loop_set(self, name: str, path_or_id: str) -> None:
        """Serve another checkpoint's loop on the same base model. Running requests go on meanwhile.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: the name is taken, its base model is another one, or its weights are not finite.
        """
        self._thread.check_may_wait()
        self._adapter_sets.check_free(name)
        try:
            added = LoopAdapterSet.load(self.reasoner, name, path_or_id)
        finally:
            release_workers()
        self._thread.call(lambda: self._adapter_sets.add(added))

    def remove_loop_set(self, name: str) -> None:
        """Accept no more requests for a loop adapter set. Its memory is freed when its last request has finished.

        Raises:
            ConfigError: there is none of this name, or it is the one that the engine started with.
        """
        self._thread.check_may_wait()
        self._adapter_sets.remove(name)
        self._thread.call(self._adapter_sets.drop_unused)

    def _drop_unused_later(self) -> None:
        with suppress(EngineError):  # the engine is closed: nothing is left to free
            self._thread.post(self._adapter_sets.drop_unused)

    def _set_up(self) -> None:
        self._thread_count.set_first()
        self._adapter_sets.update_adapters()
        self._thread_count.measure_first()

    def _after_step(self) -> None:
        self._adapter_sets.drop_unused()
        self._thread_count.after_step()

    # -- status ------------------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        """Number of torch threads that compute a step."""
        return self._thread_count.current

    @property
    def counters(self) -> EngineCounters:
        """Totals since the start."""
        return self._core.counters

    @property
    def waiting(self) -> frozenset[Future[Result]]:
        """Futures of requests that have no slot yet, without cancelled ones."""
        return frozenset(sequence.future for sequence in self._thread.waiting() if not sequence.cancelled)

    @property
    def queued(self) -> int:
        """Number of :attr:`waiting` requests."""
        return len(self.waiting)

    def count_queued(self, most_per_group: int) -> int:
        """Number of :attr:`waiting` requests, of each group at most so many."""
        groups = Counter(sequence.group for sequence in self._thread.waiting() if not sequence.cancelled)
        return sum(min(queued, most_per_group) for queued in groups.values())

    @property
    def in_flight(self) -> int:
        """Number of requests that have a slot."""
        return len(self._core.scheduler.running)

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._thread.alive

    def stalled_s(self) -> float:
        """Seconds without a step while requests wait or run; 0 when idle."""
        return time.monotonic() - self._thread.last_progress if self._thread.busy else 0.0

    def close(self, timeout: float | None = None) -> None:
        """Finish running requests, fail queued ones and end the thread; wait for that at most ``timeout`` seconds."""
        self._thread.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Close the engine; after an exception, Ctrl-C included, first cancel all requests."""
        if error is not None:
            self._thread.cancel_all()
        self.close()


def _as_list(prompts: Prompt | Rows[Prompt]) -> Rows[Prompt]:
    return [prompts] if isinstance(prompts, str | Tokens) else prompts
