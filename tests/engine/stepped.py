"""An engine whose thread takes a step only when told, and what tests ask of results."""

import threading
from typing import Any

import pytest

from slr_core.engine import Engine
from slr_core.engine.adapter_set import LoopAdapterSet, share_base
from slr_core.model.reasoner import LatentReasoner

TIMEOUT = 120


class Stepped(Engine):
    """An :class:`Engine` that stands still between calls of :meth:`step`; closing it sets it free."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._go, self._still, self._free = threading.Semaphore(0), threading.Semaphore(0), False
        super().__init__(*args, **{"threads": 1, **options})
        assert self._still.acquire(timeout=TIMEOUT)

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            self._still.release()

    def _wait_for_work(self) -> bool:
        if not self._free:
            self._still.release()
            self._go.acquire()
        return super()._wait_for_work()

    def _between_steps(self, command: Any) -> Any:
        return command()  # it stands still: this is between steps

    def add(self, name: str, reasoner: LatentReasoner) -> None:
        """:meth:`load_loop_set` without a checkpoint."""
        share_base(self.reasoner, reasoner)
        self._loops.add(LoopAdapterSet(name, reasoner))

    def step(self, count: int = 1) -> None:
        """Take so many steps; there must be something to do."""
        for _ in range(count):
            assert self._arrived or self._core.busy
            self._go.release()
            assert self._still.acquire(timeout=TIMEOUT)

    def until(self, reached: Any) -> None:
        """Step until ``reached()``."""
        for _ in range(500):
            if reached():
                return
            self.step()
        raise AssertionError("never reached")

    def drain(self) -> None:
        """Step until there is nothing to do."""
        self.until(lambda: not (self._arrived or self._core.busy))

    def sequence(self, future: Any) -> Any:
        """What the engine has of a request."""
        scheduler = self._core.scheduler
        everyone = [*self._arrived, *scheduler.waiting, *scheduler.running]
        return next((sequence for sequence in everyone if sequence.future is future), None)

    def close(self, timeout: float | None = None) -> None:
        self._free = True
        self._go.release()
        super().close(TIMEOUT if timeout is None else timeout)


def empty(engine: Engine) -> bool:
    """Whether nobody waits or runs, nothing is reserved, and all slots are zeros."""
    scheduler, cache = engine._core.scheduler, engine._core.cache
    return (
        not scheduler.waiting
        and not scheduler.running
        and scheduler.reserved == 0
        and not cache.store[..., : cache.capacity, :].any()
    )


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
