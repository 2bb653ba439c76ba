"""More requests than a server can answer, each on a new connection."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.hostile.wire import Liveness, connect, head, opened, read_response, request


class Overload(NamedTuple):
    """What an overload has done.

    Attributes:
        statuses: number of responses by status; 0: the connection ended without one.
        refusal_s: the longest time of a 429 or 503.
        retry_after: the values of ``Retry-After``.
        liveness_s: the longest time of a probe meanwhile.
    """

    statuses: Counter[int]
    refusal_s: float
    retry_after: set[int]
    liveness_s: float


def overload(
    url: str, body: Any = None, path: str = "/generate", key: str | None = None, rate: float = 200, seconds: float = 5
) -> Overload:
    """Send ``rate`` requests a second, whatever becomes of the earlier ones."""
    content = request(path, {"prompt": "w1"} if body is None else body, "connection: close", key=key)
    parts = urlsplit(url)
    statuses: Counter[int] = Counter()
    refusals: list[float] = []
    retry_after = set()

    async def send() -> None:
        started = time.monotonic()
        status, head = 0, ""
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(content)
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                status = int(head.split()[1])
                await reader.read()
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass
        statuses[status] += 1
        if status in (429, 503):
            refusals.append(time.monotonic() - started)
            retry_after.add(int(head.split("retry-after:")[1].split("\r\n")[0]))

    async def flood() -> None:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for i in range(round(rate * seconds)):
                await asyncio.sleep(max(0.0, started + i / rate - time.monotonic()))
                group.create_task(send())

    with Liveness(url) as liveness:
        asyncio.run(flood())
    return Overload(statuses, max(refusals, default=0.0), retry_after, liveness.worst_s)


def gradings(url: str, key: str | None = None, clients: int = 60) -> float:
    """Ask for gradings that take long, and leave; the time of a short one after that, in seconds."""
    long = {"questions": [{"question": "w", "answer": "1"}] * 50, "texts": ["1/" * 5000] * 50, "task": "gsm8k"}
    short = {"questions": [{"question": "w", "answer": "1"}], "texts": ["1"]}
    with opened(url, clients) as sockets:
        for connection in sockets:
            with suppress(OSError):  # refused before its body was read
                connection.sendall(request("/grade", long, key=key))
        time.sleep(0.2)
    started = time.monotonic()
    while True:
        with connect(url, timeout=120) as connection:
            connection.sendall(request("/grade", short, key=key))
            if read_response(connection)[0] == 200:
                return time.monotonic() - started
        time.sleep(0.05)


def scrapes(url: str, key: str | None = None, clients: int = 16, seconds: float = 3.0) -> float:
    """Scrape the metrics without a pause; the longest time of a probe meanwhile, in seconds."""
    keys = [f"authorization: Bearer {key}"] if key else []
    with opened(url, clients) as sockets, Liveness(url) as liveness:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for connection in sockets:
                connection.sendall(head("/metrics", *keys, method="GET"))
            for connection in sockets:
                read_response(connection)
    return liveness.worst_s
