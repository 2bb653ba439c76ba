"""Attacks by the content of a request: bodies that are costly to refuse, and answers that are costly to build."""

import threading
import time
from typing import Any, NamedTuple

from tests.hostile.wire import Liveness, connect, read_response, request

MIB = 1 << 20


def _filled(start: bytes, item: bytes, end: bytes) -> bytes:
    """A body of just under 1 MiB."""
    count = (MIB - len(start) - len(end) - 2) // (len(item) + 1)
    return start + b",".join([item] * count) + end


def _fields(start: bytes, end: bytes, value: bytes = b"1") -> bytes:
    """A body of just under 1 MiB, of many fields."""
    count = (MIB - len(start) - len(end) - 2) // (len(value) + 11)
    return start + b",".join(b'"%x":%b' % (0x1000000 + i, value) for i in range(count)) + end


_USER = b'{"role":"user","content":"w1"}'
_CHAT = b'{"messages":[' + _USER
COSTLY = {
    "empty messages": ("/v1/chat/completions", _filled(b'{"messages":[', b"{}", b"]}")),
    "numbers as messages": ("/v1/chat/completions", _filled(b'{"messages":[', b"1", b"]}")),
    "valid messages": ("/v1/chat/completions", _filled(b'{"messages":[', _USER, b"]}")),
    "empty parts": ("/v1/chat/completions", _filled(b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}")),
    "fields of a message": ("/v1/chat/completions", _fields(b'{"messages":[{', b"}]}")),
    "metadata": ("/v1/chat/completions", _fields(_CHAT + b'],"metadata":{', b"}}")),
    "template variables": ("/v1/chat/completions", _fields(_CHAT + b'],"chat_template_kwargs":{', b"}}")),
    "long template variable": (
        "/v1/chat/completions",
        _CHAT + b'],"chat_template_kwargs":{"' + b"x" * (MIB - 200) + b'":1}}',
    ),
    "tools": ("/v1/chat/completions", _filled(_CHAT + b'],"tools":[', b"{}", b"]}")),
    "modalities": ("/v1/chat/completions", _filled(_CHAT + b'],"modalities":[', b"1", b"]}")),
    "numbers as prompts": ("/generate", _filled(b'{"prompt":[', b"1", b"]}")),
    "empty prompts": ("/generate", _filled(b'{"prompt":[', b'""', b"]}")),
    "unknown fields": ("/generate", _fields(b'{"prompt":"w1",', b"}")),
    "unknown nested fields": ("/generate", _fields(b'{"prompt":"w1","convergence":{', b"}}")),
    "numbers as stop": ("/generate", _filled(b'{"prompt":"w1","stop":[', b"1", b"]}")),
    "long name": ("/v1/completions", b'{"prompt":"w1","model":"' + b"x" * (MIB - 100) + b'"}'),
    "lists of token ids": ("/v1/completions", _filled(b'{"prompt":[', b"[1]", b"]}")),
    "mixed prompts": ("/v1/completions", _filled(b'{"prompt":["a",', b"[1]", b"]}")),
}
"""Paths and bodies that are refused."""


class Cost(NamedTuple):
    """What one request has cost.

    Attributes:
        status: of the response.
        response_bytes: size of its body.
        duration_s: time until it arrived.
        liveness_s: the longest time of a probe meanwhile.
        error: the body of an error.
    """

    status: int
    response_bytes: int
    duration_s: float
    liveness_s: float
    error: str


def _measure(url: str, path: str, body: Any, key: str | None = None) -> Cost:
    """Send one request."""
    with Liveness(url) as liveness, connect(url) as connection:
        started = time.monotonic()
        connection.sendall(request(path, body, key=key))
        status, _, content = read_response(connection)
        duration = time.monotonic() - started
    error = content.decode() if status >= 400 else ""
    return Cost(status, len(content), duration, liveness.worst_s, error)


def costly_bodies(url: str, key: str | None = None) -> dict[str, Cost]:
    """Send every body of :data:`COSTLY`."""
    return {name: _measure(url, path, body, key) for name, (path, body) in COSTLY.items()}


def large_trace(
    url: str, key: str | None = None, prompts: int = 4, n: int = 16, iterations: int = 64, top_tokens: int = 50
) -> Cost:
    """Ask for a trace of many top tokens."""
    body = {
        "prompt": ["w1"] * prompts,
        "n": n,
        "max_iterations": iterations,
        "top_tokens": top_tokens,
        "max_new_tokens": 1,
        "convergence": {"criterion": "fixed"},
    }
    return _measure(url, "/trace", body, key)


def large_logprobs(url: str, key: str | None = None, n: int = 16, tokens: int = 1024, logprobs: int = 50) -> Cost:
    """Ask for the log-probabilities of many tokens."""
    body = {"prompt": ["w1"] * 4, "n": n, "max_tokens": tokens, "logprobs": logprobs}
    return _measure(url, "/v1/completions", body, key)


def long_prompts(url: str, key: str | None = None, clients: int = 8, seconds: float = 3.0) -> list[float]:
    """Send prompts of a megabyte without a pause; the times of short requests meanwhile, in seconds."""
    long = request("/generate", {"prompt": "w1 w2 " * (MIB // 6 - 10)}, key=key)
    ends, times = time.monotonic() + seconds, []

    def flood() -> None:
        with connect(url) as connection:
            while time.monotonic() < ends:
                connection.sendall(long)
                read_response(connection)

    threads = [threading.Thread(target=flood) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < ends:
        times.append(_measure(url, "/generate", {"prompt": "w1", "max_new_tokens": 1}, key).duration_s)
    for thread in threads:
        thread.join()
    return times
