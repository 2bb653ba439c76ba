"""A core that takes a step when told, an engine that waits after every step, and what tests compare in results."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from slr_core.engine import Engine
from slr_core.engine.adapter_set import LoopAdapterSet, share_base
from slr_core.engine.adapter_sets import DEFAULT_LOOP_SET, LoopAdapterSets
from slr_core.engine.core import Core
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.reasoner import LatentReasoner

TIMEOUT = 120


class SteppedCore:
    """A :class:`Core` with its loop adapter sets, stepped by the test. Options as those of :class:`Engine`."""

    def __init__(
        self,
        reasoner: LatentReasoner,
        *,
        slots: int = 32,
        capacity: int | None = None,
        prefix_gib: float = 0.25,
        prefill_chunk: int = 512,
        static_shapes: bool = False,
        on_step: Any = None,
    ) -> None:
        self.reasoner = reasoner
        self.lora_batch = LoraBatch(reasoner.base)
        self.core = Core(
            self.lora_batch,
            slots=slots,
            capacity=capacity or reasoner.max_positions,
            prefix_bytes=int(prefix_gib * 2**30),
            prefill_chunk=prefill_chunk,
            static_shapes=static_shapes,
            on_step=on_step,
        )
        self.adapter_sets = LoopAdapterSets(
            self.lora_batch,
            LoopAdapterSet(DEFAULT_LOOP_SET, reasoner),
            tuned_rows=slots,
            in_use=lambda: {sequence.adapter_set for sequence in self.sequences()},
            on_unused=lambda: None,
        )
        self.adapter_sets.update_adapters()
        self.model, self.counters = self.lora_batch.model, self.core.counters

    # -- what an engine does on behalf of its callers ------------------------------------------------

    def submit(self, request: Any, *, loop_set: str | None = None, **options: Any) -> Any:
        """Queue a request: its future."""
        sequence = self.core.new_sequence(request, self.adapter_sets.find(loop_set), **options)
        self.core.add(sequence)
        return sequence.future

    def add(self, name: str, reasoner: LatentReasoner) -> LoopAdapterSet:
        """Serve another reasoner's loop on the same base model."""
        share_base(self.reasoner, reasoner)
        added = LoopAdapterSet(name, reasoner)
        self.adapter_sets.add(added)
        return added

    def remove(self, name: str) -> None:
        """Accept no more requests for a loop adapter set."""
        self.adapter_sets.remove(name)
        self.adapter_sets.drop_unused()

    # -- steps ---------------------------------------------------------------------------------------

    def step(self, count: int = 1) -> None:
        """Take ``count`` steps; there must be something to do."""
        for _ in range(count):
            assert self.core.busy
            self.core.step()
            self.adapter_sets.drop_unused()

    def until(self, reached: Any) -> None:
        """Step until ``reached()``."""
        for _ in range(500):
            if reached():
                return
            self.step()
        raise AssertionError("never reached")

    def drain(self) -> None:
        """Step until there is nothing to do."""
        self.until(lambda: not self.core.busy)

    # -- what it holds -------------------------------------------------------------------------------

    def sequences(self) -> list[Any]:
        """All requests, with and without a slot."""
        return [*self.core.scheduler.waiting, *self.core.scheduler.running]

    def sequence(self, future: Any) -> Any:
        """The request of a future, while the core has it."""
        return next((sequence for sequence in self.sequences() if sequence.future is future), None)

    @property
    def queued(self) -> int:
        """Requests without a slot, with cancelled ones."""
        return len(self.core.scheduler.waiting)

    @property
    def in_flight(self) -> int:
        """Requests with a slot."""
        return len(self.core.scheduler.running)


@contextmanager
def gated(reasoner: LatentReasoner, **options: Any) -> Iterator[tuple[Engine, threading.Semaphore]]:
    """An engine that waits at the end of every step, and the semaphore that lets it go on."""
    gate = threading.Semaphore(0)
    options = {"threads": 1, **options}
    with Engine(reasoner, on_step=lambda _: gate.acquire(timeout=TIMEOUT), **options) as engine:
        try:
            yield engine, gate
        finally:
            gate.release(10_000)


def wait_until(reached: Any) -> None:
    """Wait until ``reached()``, while another thread works."""
    end = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < end, "never reached"
        time.sleep(0.001)


def is_empty(core: Core) -> bool:
    """Whether no request waits or runs, nothing is reserved, and all slots are zeros."""
    scheduler, cache = core.scheduler, core.cache
    return not core.busy and scheduler.reserved == 0 and not cache.store[..., : cache.capacity, :].any()


def facts(result: Any) -> tuple[Any, ...]:
    """What rounding must not change."""
    thoughts = tuple(record.thought for record in result.records)
    adapters = tuple(record.adapter for record in result.records)
    return (
        result.token_ids,
        result.text,
        result.finish_reason,
        result.iterations,
        result.exit_reason,
        result.iterations_per_token,
        tuple(tuple((record.t, record.adapter) for record in loop) for loop in result.records_per_token),
        result.forward_passes,
        result.prompt_tokens,
        thoughts,
        adapters,
        result.stability.oscillating,
        result.stability.converged,
    )


def near(a: float | None, b: float | None, tolerance: float = 1e-4) -> bool:
    """Equal numbers, or both undefined."""
    return a is b is None or a == pytest.approx(b, rel=tolerance, abs=tolerance)
