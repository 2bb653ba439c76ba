"""The text of ``GET /metrics``, at a bounded cost to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_REST = 4.0
"""Least time between two renderings, as a multiple of the time that the first one took."""


class Exposition:
    """Renders metrics. However many scrapes there are, this takes at most a fifth of the event loop's time.

    A scrape gets metrics that are read after it has arrived: scrapes that wait for a rendering share it.

    Args:
        registry: the metrics.
        clock: returns seconds, monotonic.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._waiting: dict[str, asyncio.Task[bytes]] = {}
        """Renderings that have not begun, by content type."""
        self._free_at = -float("inf")
        """When the next rendering may begin."""

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type.

        Args:
            accept: the header ``Accept`` of the scrape.
        """
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is not a number
            encode, content_type = choose_encoder("")
        task = self._waiting.get(content_type)
        if task is None:
            task = self._waiting[content_type] = asyncio.create_task(self._render(encode, content_type))
        return await asyncio.shield(task), content_type

    async def _render(self, encode: Callable[[CollectorRegistry], bytes], content_type: str) -> bytes:
        try:
            while (seconds := self._free_at - self._clock()) > 0:
                await asyncio.sleep(seconds)
        finally:
            del self._waiting[content_type]
        started = self._clock()
        content = encode(self._registry)
        ended = self._clock()
        self._free_at = ended + _REST * (ended - started)
        return content
