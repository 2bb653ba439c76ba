"""The number of torch threads: the fastest one, measured at startup and again when the step time changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from slr_core.engine.core import Core
from slr_core.engine.runner.device import fastest_threads, release_workers, restore_default_threads

logger = logging.getLogger(__name__)

TIMED_STEP = 8, 64
"""Rows, and positions that they read, of the step that is timed."""


class ThreadCount:
    """Sets the number of threads of the engine's thread. All methods run on that thread.

    Args:
        core: what runs the steps.
        fixed: the number to use; ``None``: the fastest one, measured.
        on_measured: called after every measurement.

    Attributes:
        current: the number in use.
    """

    def __init__(self, core: Core, fixed: int | None, on_measured: Callable[[], None]) -> None:
        self._core, self._on_measured = core, on_measured
        self._default = torch.get_num_threads()
        self._measures = fixed is None and core.runner.device.type == "cpu"
        self.current = fixed or self._default

    def set_first(self) -> None:
        """Set the fixed number, or the caller's until :meth:`measure_first`."""
        torch.set_num_threads(self.current)

    def measure_first(self) -> None:
        """Measure the number if it is not fixed. All adapters must be there, and no request."""
        if self._measures:
            self._measure()
            self._core.cache.reset()
        restore_default_threads(self._default)

    def after_step(self) -> None:
        """Measure again if the step time has changed: the machine may have been busy at the last measurement."""
        if not (self._measures and self._core.step_times.changed):
            return
        if self._core.free_slots >= min(TIMED_STEP[0], self._core.cache.slots):
            logger.info("The step time has changed: measuring the number of threads again")
            self._measure()
            restore_default_threads(self._default)

    def _measure(self) -> None:
        self.current = fastest_threads(lambda: self._core.run_idle(*TIMED_STEP), self._default)
        release_workers()  # those of the largest count that was tried
        self._on_measured()
        self._core.step_times.reset()
