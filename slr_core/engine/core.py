"""The engine without threads: the queue, the slots and the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import replace
from math import inf

import torch

from slr_core.engine.adapter_set import LoopAdapterSet
from slr_core.engine.events import Event
from slr_core.engine.output import OutputProcessor
from slr_core.engine.prefix_cache import PrefixCache, prefix_keys
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.runner.model_runner import ModelRunner
from slr_core.engine.runner.step_times import StepTimes
from slr_core.engine.scheduler import Plan, Scheduler
from slr_core.engine.sequence import Phase, Sequence, TokenLoops
from slr_core.engine.statistics import EngineCounters, StepStats
from slr_core.errors import DeadlineError, RequestError
from slr_core.generation.decoding import DecodeState
from slr_core.generation.reference import prefix_joins_loop
from slr_core.loop.convergence import ExitRule
from slr_core.loop.diagnostics import LoopTracker
from slr_core.loop.token_workspace import Token
from slr_core.types import Request

logger = logging.getLogger(__name__)


class Core:
    """Runs requests: :meth:`step` takes every request one forward pass further.

    Args:
        lora_batch: the base model with all adapters.
        slots: maximum number of requests that run at once.
        capacity: positions of a slot.
        prefix_bytes: memory of the prefix cache; 0: no prefix cache.
        prefill_chunk: maximum number of prompt positions in one step.
        static_shapes: run loop and decode passes in fixed shapes.
        on_step: called after every step that ran a request.
    """

    def __init__(
        self,
        lora_batch: LoraBatch,
        *,
        slots: int,
        capacity: int,
        prefix_bytes: int,
        prefill_chunk: int,
        static_shapes: bool,
        on_step: Callable[[StepStats], None] | None,
    ) -> None:
        self.on_step = on_step
        self.cache = KVCache(lora_batch.model, slots, capacity)
        self.prefixes = PrefixCache(prefix_bytes)
        self.counters = EngineCounters()
        self.step_times = StepTimes()
        self.runner = ModelRunner(lora_batch, self.cache, static_shapes=static_shapes)
        self.outputs = OutputProcessor(self.runner, self.prefixes, self.counters)
        self.scheduler = Scheduler(
            slots,
            slots * capacity,
            prefill_chunk=prefill_chunk,
            known_prefixes=lambda sequence: self.prefixes.known(sequence.prefix_keys),
            drop=self._drop,
            admit=self.outputs.admit,
        )

    @torch.inference_mode()
    def step(self) -> None:
        """Drop cancelled requests, admit waiting ones, run one forward pass for each, choose the next tokens."""
        began, before = time.perf_counter(), replace(self.counters)
        plan = self.scheduler.schedule()
        output = self.runner.execute(plan)
        self.outputs.process(output)
        self._count_step(plan, before, began)
        for sequence in [s for s in self.scheduler.running if s.phase is Phase.DONE]:
            self._leave(sequence)

    # -- requests ----------------------------------------------------------------------------------

    def new_sequence(
        self,
        request: Request,
        adapter_set: LoopAdapterSet,
        *,
        on_event: Callable[[Event], None] | None = None,
        deadline: float = inf,
        group: Hashable = None,
    ) -> Sequence:
        """Make a request ready for the queue; see :meth:`Engine.submit`.

        Raises:
            RequestError: the request is larger than a slot.
        """
        reserved = adapter_set.reserved_positions(request)
        if reserved > self.cache.capacity:
            raise RequestError(
                f"the request may need {reserved} positions, a slot has {self.cache.capacity}", param="prompt"
            )
        sequence = Sequence(
            request=request,
            adapter_set=adapter_set,
            future=Future(),
            on_event=on_event,
            deadline=deadline,
            group=object() if group is None else group,
            prefix_keys=self._prefix_keys(request, adapter_set),
            reserved=reserved,
            answer=DecodeState(adapter_set.reasoner, request),
            tracker=LoopTracker(ExitRule(request.loop, adapter_set.config.guard)),
            token=_token_loops(request, adapter_set, reserved),
            # With fixed shapes, two replays cost less than one pass of another shape.
            prefix_in_loop=self.runner.fixed_shapes is None and prefix_joins_loop(adapter_set.reasoner, request),
        )
        sequence.future.add_done_callback(sequence.note_cancelled)
        return sequence

    def _prefix_keys(self, request: Request, adapter_set: LoopAdapterSet) -> tuple[bytes, ...]:
        """Keys of the prefixes that a request can reuse and leave."""
        workspace, depth, salt = adapter_set.workspace, request.loop.max_iterations, adapter_set.prefix_salt
        if self.prefixes.max_bytes == 0 or request.score_prompt:  # scored prompts have to be run
            return ()
        if isinstance(workspace, Token):
            # A shared cache holds nothing that iterations before the last could attend to.
            if workspace.shared_cache or depth == 0:
                return ()
            salt += depth.to_bytes(2, "little")
        elif not workspace.prefills:
            return ()
        return prefix_keys(request.prompt_ids, salt)

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.scheduler.waiting.append(sequence)

    def fail_waiting(self, error: Exception) -> None:
        """Fail all queued requests."""
        for sequence in list(self.scheduler.waiting):
            sequence.settle(error)
            self.scheduler.release(sequence)

    def fail_all(self, error: Exception) -> None:
        """Fail all queued and running requests, without touching the model's memory."""
        self.fail_waiting(error)
        for sequence in list(self.scheduler.running):
            sequence.settle(error)
            self.scheduler.release(sequence)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def _drop(self, sequence: Sequence) -> None:
        # If it was cancelled, this notifies `concurrent.futures.wait`.
        sequence.settle(DeadlineError("the request's deadline has passed"))
        self.counters.wasted_iterations += sequence.iterations_run
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Free a request's slot. A free slot is all zeros."""
        slot = sequence.slot
        moved = self.scheduler.release(sequence)
        if slot < 0:
            return
        self.cache.clear(slot, 0, sequence.reserved)
        if moved is not None:
            last = len(self.scheduler.running)
            self.cache.move(last, slot, moved.reserved)
            self.cache.clear(last, 0, moved.reserved)

    # -- measuring ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def run_idle(self, rows: int, width: int) -> None:
        """Compute what a step of single positions computes, each with another adapter, in free slots.

        Args:
            rows: number of rows; reduced to the number of free slots, of which there must be one.
            width: positions that they read; reduced to those of a slot.
        """
        first, width = len(self.scheduler.running), min(width, self.cache.capacity)
        slots = range(first, first + min(rows, self.free_slots))
        self.runner.head(self.runner.run_idle(slots, width))
        for slot in slots:
            self.cache.clear(slot, width - 1, width)  # the others are not written, and need no memory

    @property
    def free_slots(self) -> int:
        """Number of slots without a request."""
        return self.cache.slots - len(self.scheduler.running)

    def _count_step(self, plan: Plan, before: EngineCounters, began: float) -> None:
        if not plan:
            return
        now = self.counters
        now.steps += 1
        now.row_steps += len(plan)
        if all(row.queries == 1 for row in plan):
            width = max(sequence.filled for sequence, _ in plan)
            self.step_times.record(len(plan), width, time.perf_counter() - began)
        if self.on_step is None:
            return
        stats = StepStats(
            duration_s=time.perf_counter() - began,
            rows=len(plan),
            iterations=now.iterations - before.iterations,
            prefill_tokens=now.prefill_tokens - before.prefill_tokens,
            tokens=now.tokens - before.tokens,
            used_positions=sum(sequence.used_positions for sequence in self.scheduler.running),
        )
        try:
            self.on_step(stats)
        except BaseException:  # a callback may raise SystemExit too
            logger.exception("Step callback failed")


def _token_loops(request: Request, adapter_set: LoopAdapterSet, reserved: int) -> TokenLoops | None:
    workspace = adapter_set.workspace
    if not isinstance(workspace, Token):
        return None
    depth = request.loop.max_iterations
    copies = workspace.cache_copies(depth)
    return TokenLoops(copies, reserved // copies, workspace.shared_cache, depth, request.trace_tokens)
