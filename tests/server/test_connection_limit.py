"""The number of connections is limited, and running out of descriptors costs neither the server nor its log."""

import errno
import resource
import time

import pytest

from slr_core.errors import ConfigError
from slr_server import cli
from slr_server.connection_limit import RESERVED_CONNECTIONS, Admitted, ConnectionLimit, max_connections
from slr_server.observability.loop_errors import LoopErrorLog
from tests.hostile import connections as attacks
from tests.hostile.wire import connect, opened, read_response, request
from tests.server.process import Server


class Fake:
    closed = False

    def give_way(self):
        self.closed = True


@pytest.fixture
def limit():
    return ConnectionLimit(2)


def add(limit, count):
    fakes = [Fake() for _ in range(count)]
    return fakes, [limit.open(fake) for fake in fakes]


def test_idle_connection_gives_way(limit):
    (first, second), _ = add(limit, 2)
    for fake in (second, first):
        limit.mark_active(fake)
        limit.mark_idle(fake)
    _, admitted = add(limit, 1)
    assert (admitted, first.closed, second.closed) == ([Admitted.FULLY], False, True)
    limit.mark_active(first)
    assert add(limit, 1)[1] == [Admitted.FOR_PROBES], "a connection with a request stays"
    limit.close(first)
    limit.mark_idle(first)
    assert len(limit) == 2


def test_probes_have_room(limit):
    fakes, admitted = add(limit, 2 + RESERVED_CONNECTIONS)
    assert admitted == [Admitted.FULLY] * 2 + [Admitted.FOR_PROBES] * RESERVED_CONNECTIONS
    limit.mark_active(fakes[0])
    (new,), admitted = add(limit, 1)
    assert admitted == [Admitted.FOR_PROBES]
    assert [fake.closed for fake in fakes[:3]] == [False, True, False], "the oldest without a byte gives way"
    for fake in (*fakes, new):
        limit.mark_active(fake)
    assert add(limit, 1)[1] == [Admitted.NOT]


def test_limit_follows_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert max_connections(None) == 160
    assert max_connections(100) == 100
    assert not raised
    assert max_connections(300) == 300
    assert raised == [(396, 512)]
    monkeypatch.undo()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: int("too many"))
    with pytest.raises(ConfigError, match="max_connections: 300 connections need 396 open files"):
        max_connections(300)


def test_errors_of_the_loop_are_counted(caplog):
    now = [0.0]
    log = LoopErrorLog(lambda: now[0])
    context = {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}
    for _ in range(1000):
        log(None, context)
    now[0] = 11.0
    log(None, context)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "event loop: accept: [Errno 24] Too many open files"
    assert second == f"{first} (999 more in the last 11 s)"
    assert "Traceback" not in caplog.text


def test_probe_is_read_before_it_gives_way():
    assert 3 * cli._ACCEPTED_AT_ONCE < RESERVED_CONNECTIONS


@pytest.mark.slow
def test_many_connections(tiny_checkpoint):
    server = Server(tiny_checkpoint, tiny_checkpoint.parent / "connections", "--max-connections", "100")
    try:
        flood = attacks.many_connections(server.url, connections=300)
        assert flood.liveness_s < 4
        with opened(server.url, 99) as idle:
            for each in idle:
                each.sendall(request("/generate", {}))
                assert read_response(each)[0] == 400
            with connect(server.url) as first, connect(server.url) as second:
                for each in (first, second):
                    each.sendall(request("/generate", {"prompt": "w1", "max_new_tokens": 1}))
                    assert read_response(each)[0] == 200
            assert idle[0].recv(1) == b"", "it was idle for longest"
        # On connections with requests nothing gives way: health checks pass, others get 503.
        with opened(server.url, 100) as busy:
            for each in busy:
                each.sendall(b"POST /generate HTTP/1.1\r\n")
            time.sleep(0.2)
            with connect(server.url) as late:
                late.sendall(request("/generate", {"prompt": "w1"}))
                status, headers, body = read_response(late)
            assert (status, headers["connection"]) == (503, "close")
            assert b"too_many_connections" in body
            assert int(headers["retry-after"]) >= 1
            with opened(server.url, RESERVED_CONNECTIONS) as unfinished:
                for each in unfinished:
                    each.sendall(b"GET /livez HTTP/1.1\r\n")
                time.sleep(3)  # a second for their headers, and one to read that they are too late
                with connect(server.url) as probe:
                    probe.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    assert read_response(probe)[0] == 200
    finally:
        server.kill()


@pytest.mark.slow
def test_no_descriptors(tiny_checkpoint):
    """Without descriptors the server waits, and its log stays small; it goes on when there are some."""
    server = Server(tiny_checkpoint, tiny_checkpoint.parent / "descriptors")
    try:
        files = server.descriptors + 20
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (files, files))
        with opened(server.url, 100):
            time.sleep(3)
        server.until(lambda: server.metrics()["slr_connections"] < 5)
        log = server.log.read_text()
        assert "Too many open files" in log
        assert len(log) < 20_000
    finally:
        server.kill()
