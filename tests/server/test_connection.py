"""Limits of a connection, on a server in its own process."""

import errno
import json
import socket
import time
from unittest.mock import MagicMock

import pytest

from slr_server.connection import LINGER_S, Connection
from tests.hostile import connections as attacks
from tests.hostile.wire import connect, head, read_all, read_response, request
from tests.server import events
from tests.server.conftest import KEY

LIVENESS_S = 4.0
"""Alone a probe takes some milliseconds; without limits it took 5 to 25 s. Other tests share the processor."""


@pytest.mark.parametrize("key", [None, KEY])
def test_one_byte_chunks(guarded, key):
    flood = attacks.one_byte_chunks(guarded.url, key=key)
    assert flood.closed_after_s < 15
    assert flood.liveness_s < LIVENESS_S
    statuses = {response[9:12] for response in flood.responses}
    # So many chunks may be refused before the key is.
    assert statuses <= ({b"401", b"400"} if key is None else {b"400"})
    assert all(b"connection: close" in response for response in flood.responses)


def test_early_refusal_arrives(guarded):
    for key, status in ((None, b"401"), (KEY, b"413")):
        for _ in range(3):
            assert attacks.early_refusal(guarded.url, key=key).startswith(b"HTTP/1.1 " + status)


def test_late_headers(guarded):
    flood = attacks.late_headers(guarded.url)
    assert flood.closed_after_s < 10
    assert flood.liveness_s < LIVENESS_S


def test_late_headers_are_refused(guarded):
    with connect(guarded.url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        status, headers, body = read_response(connection)
    assert status == 408
    assert b"headers_timeout" in body
    assert headers["connection"] == "close"


@pytest.mark.parametrize("extra", [b"G", head("/livez", method="GET"), b"\x00", request("/generate", {}) * 500])
def test_disconnect_after_pipelined_bytes(guarded, extra):
    attacks.pipelined_then_gone(guarded.url, extra=extra, key=KEY)
    left = time.monotonic()
    guarded.idle()
    assert time.monotonic() - left < 20  # a disconnect that is not seen takes 50 s


def test_pipelining_closes(guarded):
    """The first of two requests is answered, and the connection closes."""
    with connect(guarded.url) as connection:
        connection.sendall(request("/generate", {"prompt": "w1", "max_new_tokens": 2}, key=KEY))
        connection.sendall(head("/livez", method="GET"))
        answered = read_all(connection)
    assert answered.startswith(b"HTTP/1.1 200")
    assert answered.count(b"HTTP/1.1") == 1


def test_keep_alive(guarded):
    with connect(guarded.url) as connection:
        for _ in range(3):
            connection.sendall(b"\r\n" + request("/generate", {"prompt": "w1", "max_new_tokens": 2}, key=KEY))
            assert read_response(connection)[0] == 200
            connection.sendall(head("/livez", method="GET"))
            status, headers, _ = read_response(connection)
            assert (status, headers.get("connection")) == (200, None)


def test_trailer_is_no_header(guarded):
    trailer = f"0\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()
    with connect(guarded.url) as connection:
        connection.sendall(head("/generate", attacks.CHUNKED) + trailer)
        assert read_response(connection)[0] == 401


@pytest.mark.parametrize("name", attacks.MALFORMED)
def test_malformed(guarded, name):
    """Where the rest of a request is refused, the application counts it: as a request, if its path runs the model."""
    before = guarded.metrics()["slr_rejections_total{invalid}"]
    status, told = attacks.malformed(guarded.url, name)
    assert status == (431 if name == "head of 100 KB" else 400)
    assert told["error"].keys() == {"type", "message", "param", "code"}
    assert len(told["x-request-id"]) == 32
    assert told["connection"] == "close"
    assert guarded.metrics()["slr_rejections_total{invalid}"] == before + 1
    assert told["x-request-id"] in guarded.log.read_text()


def test_half_request_then_gone(guarded):
    for _ in range(20):
        connection = connect(guarded.url)
        connection.sendall(request("/generate", attacks.LONG, key=KEY)[:-10])
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    guarded.idle()


def test_reset_while_closing():
    """A client that has reset the connection, which the event loop does not know yet."""
    closing = Connection.__new__(Connection)
    closing._in_head = closing._discarding = False
    closing.transport, closing.loop = MagicMock(), MagicMock()
    closing.transport.is_closing.return_value = False
    closing.transport.write_eof.side_effect = OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    closing.close_after_response()
    closing.loop.call_later.assert_called_once_with(LINGER_S, closing.transport.close)


BODY = b'{"prompt": "w1", "max_new_tokens": 2}'


@pytest.mark.parametrize(
    "framing", [(b"content-length: %d" % len(BODY), BODY), (attacks.CHUNKED.encode(), b"25\r\n%b\r\n0\r\n\r\n" % BODY)]
)
@pytest.mark.parametrize("pause_s", [0, 0.1])
def test_body_of_an_upgrade(guarded, framing, pause_s):
    """Clients such as Java's offer HTTP/2 so with their first request, whatever its method."""
    header, body = framing
    upgrade = ("connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAAAA")
    with connect(guarded.url) as connection:
        connection.sendall(head("/generate", *upgrade, header.decode(), key=KEY))
        time.sleep(pause_s)
        connection.sendall(body + b"PRI * HTTP/2.0")
        status, headers, content = read_response(connection)
        assert connection.recv(1) == b""
    assert (status, headers["connection"]) == (200, "close"), content
    assert b"results" in content


def test_old_version_gets_no_chunks(guarded):
    body = json.dumps({"prompt": "w1", "max_new_tokens": 2, "stream": True}).encode()
    with connect(guarded.url) as connection:
        connection.sendall(request("/generate", body, key=KEY).replace(b"HTTP/1.1", b"HTTP/1.0"))
        top, _, content = read_all(connection).partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in top
    assert [event.name for event in events.of(content.decode())][-2:] == ["result", "done"]
    assert content.startswith(b"event: ")
