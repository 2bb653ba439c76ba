"""How late the event loop runs: while it is held up, no request, probe or timer is served."""

from __future__ import annotations

import asyncio

_EVERY_S = 0.1
_WINDOW_S = 5.0


class LoopLag:
    """The longest delay of the event loop in the last five to ten seconds, measured by a task."""

    def __init__(self) -> None:
        self._worst, self._previous = 0.0, 0.0
        """Of this window, and of the one before."""

    @property
    def seconds(self) -> float:
        """The delay."""
        return max(self._worst, self._previous)

    async def watch(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + _WINDOW_S
        while True:
            started = loop.time()
            await asyncio.sleep(_EVERY_S)
            now = loop.time()
            if now >= ends:
                self._previous, self._worst, ends = self._worst, 0.0, now + _WINDOW_S
            self._worst = max(self._worst, now - started - _EVERY_S)
