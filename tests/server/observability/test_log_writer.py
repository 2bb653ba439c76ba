import logging
import threading
import time

from slr_server.observability import log_writer
from slr_server.observability.log_writer import LogWriter


def record(message):
    return logging.LogRecord("x", logging.INFO, "", 0, message, None, None)


def test_lines_arrive_in_order():
    written = []
    writer = LogWriter(written.append)
    for i in range(1000):
        writer.emit(record(f"line {i} ä"))
    writer.flush()
    assert b"".join(written).decode().splitlines() == [f"line {i} ä" for i in range(1000)]


def test_blocked_stream(monkeypatch):
    """Whoever logs does not wait; what does not fit is counted."""
    monkeypatch.setattr(log_writer, "_MOST_LINES", 10)
    monkeypatch.setattr(log_writer, "_FLUSH_S", 0.05)
    opened, written = threading.Event(), []

    def write(data):
        assert opened.wait(20)
        written.append(data)

    writer = LogWriter(write)
    writer.emit(record("first"))
    while writer._lines:  # until it is being written
        time.sleep(0.001)
    started = time.monotonic()
    for i in range(110):
        writer.emit(record(str(i)))
    writer.flush()
    assert time.monotonic() - started < 5
    opened.set()
    monkeypatch.undo()
    writer.flush()
    lines = b"".join(written).decode().splitlines()
    assert lines == ["first", *map(str, range(10)), "100 log lines were dropped: standard error was blocked"]


def test_closed_stream_and_wrong_record():
    def write(data):
        written.append(data)
        raise BrokenPipeError

    written = []
    writer = LogWriter(write)
    writer.emit(record("one"))
    writer.flush()
    writer.emit(logging.LogRecord("x", logging.INFO, "", 0, "%d", ("no number",), None))
    writer.flush()
    assert written[0] == b"one\n"
    assert b"cannot be formatted" in written[1]
