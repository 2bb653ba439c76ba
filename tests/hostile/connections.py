"""Attacks below a request: slow and endless bodies, late headers, pipelined bytes."""

import json
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from tests.hostile.wire import Liveness, connect, head, opened, read_all, request

CHUNKED = "transfer-encoding: chunked"


class Flood(NamedTuple):
    """What a flood has done.

    Attributes:
        closed_after_s: the longest time until the server closed a connection.
        liveness_s: the longest time of a probe meanwhile.
        responses: what each connection received.
    """

    closed_after_s: float
    liveness_s: float
    responses: list[bytes]


def one_byte_chunks(
    url: str, path: str = "/generate", key: str | None = None, connections: int = 4, seconds: float = 20.0
) -> Flood:
    """Send chunked bodies of one byte a chunk until the server closes the connection."""
    chunks = b"1\r\n \r\n" * 10_000
    closed = [seconds] * connections
    responses = [b""] * connections

    def flood(i: int) -> None:
        started = time.monotonic()
        with connect(url) as connection:
            connection.sendall(head(path, CHUNKED, key=key))
            reader = threading.Thread(target=lambda: responses.__setitem__(i, read_all(connection)))
            reader.start()
            connection.settimeout(seconds)
            try:
                while time.monotonic() < started + seconds:
                    connection.sendall(chunks)
            except OSError:
                closed[i] = time.monotonic() - started
            if closed[i] == seconds:
                connection.close()
            reader.join(seconds)

    with Liveness(url) as liveness:
        threads = [threading.Thread(target=flood, args=(i,)) for i in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return Flood(max(closed), liveness.worst_s, responses)


def late_headers(url: str, connections: int = 20, seconds: float = 20.0) -> Flood:
    """Send a header byte by byte, and on half of the connections nothing at all."""
    started = time.monotonic()
    with Liveness(url) as liveness, opened(url, connections) as sockets:
        for connection in sockets[::2]:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
        closed: dict[int, float] = {}
        while len(closed) < connections and time.monotonic() < started + seconds:
            time.sleep(0.05)
            for i, connection in enumerate(sockets):
                if i in closed:
                    continue
                try:
                    if i % 2 == 0:
                        connection.send(b"y")
                    connection.setblocking(False)
                    if connection.recv(1 << 16) == b"":
                        closed[i] = time.monotonic() - started
                except BlockingIOError:
                    pass
                except OSError:
                    closed[i] = time.monotonic() - started
                finally:
                    connection.setblocking(True)
    last = max(closed.values()) if len(closed) == connections else seconds
    return Flood(last, liveness.worst_s, [])


LONG = {
    "prompt": ["w1 w2 w3"] * 16,
    "n": 16,
    "max_new_tokens": 50,
    "max_iterations": 8,
    "convergence": {"criterion": "fixed"},
}
"""A request that keeps a server busy for a while."""


def pipelined_then_gone(
    url: str, body: Any = LONG, extra: bytes = b"G", path: str = "/generate", key: str | None = None
) -> None:
    """Send a request and more bytes behind it, and disconnect once it runs."""
    connection = connect(url)
    connection.sendall(request(path, body, key=key))
    time.sleep(0.3)
    connection.sendall(extra)
    time.sleep(0.2)
    connection.close()


def early_refusal(url: str, body_bytes: int = 8 << 20, path: str = "/generate", key: str | None = None) -> bytes:
    """Send a body that is refused by its declared length; the response that arrives."""
    with connect(url) as connection:
        connection.sendall(head(path, f"content-length: {body_bytes}", key=key))
        with suppress(OSError):
            for _ in range(body_bytes >> 16):
                connection.sendall(b" " * (1 << 16))
        return read_all(connection)


MALFORMED = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "two keys": b"GET /livez HTTP/1.1\r\nhost: a\r\nauthorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
    "two content types": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-type: a/b\r\ncontent-type: c/d\r\n\r\n",
    "host with a space": b"GET /livez HTTP/1.1\r\nhost: a b\r\n\r\n",
    "host with a user": b"GET /livez HTTP/1.1\r\nhost: a@b\r\n\r\n",
    "host with a name for a port": b"GET /livez HTTP/1.1\r\nhost: a:http\r\n\r\n",
    "host beyond ASCII": b"GET /livez HTTP/1.1\r\nhost: \xff\r\n\r\n",
    "target of a proxy": b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
    "space before colon": b"GET /livez HTTP/1.1\r\nhost : a\r\n\r\n",
    "folded header": b"GET /livez HTTP/1.1\r\nhost: a\r\nx: b\r\n c\r\n\r\n",
    "length and chunks": b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    "two lengths": b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
    "negative length": b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-length: -3\r\n\r\n",
    "another coding": b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /generate HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n",
    "bad chunk": b"POST /generate HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "unknown method": b"BREW / HTTP/1.1\r\nhost: a\r\n\r\n",
    "head of 100 KB": b"GET /livez HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000,
}
"""Bytes that are not an HTTP request."""


def malformed(url: str, name: str = "garbage") -> tuple[int, dict[str, Any]]:
    """Send bytes of :data:`MALFORMED`: the response's status, and its headers and error body as one mapping."""
    with connect(url) as connection:
        with suppress(OSError):
            connection.sendall(MALFORMED[name])
        top, _, content = read_all(connection).partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers | json.loads(content)


def many_connections(url: str, connections: int = 300, seconds: float = 3.0) -> Flood:
    """Open connections; half of them send a request and then nothing, the others nothing at all."""
    with Liveness(url) as liveness, opened(url, connections) as sockets:
        for connection in sockets[::2]:
            with suppress(OSError):
                connection.sendall(head("/livez", method="GET"))
        time.sleep(seconds)
    return Flood(seconds, liveness.worst_s, [])
