"""Plain sockets, for what HTTP clients do not send, and a probe of liveness meanwhile."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit


def connect(url: str, timeout: float = 60) -> socket.socket:
    """A connection to a server."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=timeout)


def head(path: str, *headers: str, method: str = "POST", key: str | None = None) -> bytes:
    """A request line and headers."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *headers]
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode()


def request(path: str, body: Any, *headers: str, key: str | None = None) -> bytes:
    """A whole request; the body is bytes or JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, f"content-length: {len(content)}", *headers, key=key) + content


def read_all(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    parts = []
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a response with a length."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers.get("content-length", 0)))


class Liveness:
    """The longest time that a probe has taken, on new connections."""

    def __init__(self, url: str) -> None:
        self.url, self.worst_s = url, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            started = time.monotonic()
            try:
                with connect(self.url, timeout=30) as connection:
                    connection.sendall(head("/livez", "connection: close", method="GET"))
                    alive = read_all(connection).startswith(b"HTTP/1.1 200")
            except OSError:
                alive = False
            self.worst_s = max(self.worst_s, time.monotonic() - started if alive else 30.0)

    def __enter__(self) -> "Liveness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def opened(url: str, count: int) -> Iterator[list[socket.socket]]:
    """Several connections."""
    connections = [connect(url) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
