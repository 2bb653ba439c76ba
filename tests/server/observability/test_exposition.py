"""Scrapes share renderings, and leave the event loop most of its time."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter

from slr_server.observability.exposition import Exposition

COST_S = 0.02


def test_scrapes_share_renderings():
    registry = CollectorRegistry()
    scrapes, renderings = Counter("scrapes", "", registry=registry), []

    class Slow:
        def collect(self):
            renderings.append(None)
            time.sleep(COST_S)
            return []

    registry.register(Slow())
    renderings.clear()

    async def scrape(exposition):
        scrapes.inc()
        content, content_type = await exposition.render("")
        assert content_type.startswith("text/plain")
        return content

    async def scenario():
        exposition = Exposition(registry)
        assert b"scrapes_total 1.0" in await scrape(exposition)
        began = time.monotonic()
        contents = await asyncio.gather(*(scrape(exposition) for _ in range(20)))
        assert time.monotonic() - began > 4 * COST_S
        assert len(renderings) == 2
        assert all(b"scrapes_total 21.0" in content for content in contents)

    asyncio.run(scenario())
