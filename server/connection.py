"""HTTP connections: uvicorn's protocol with limits on what a client can send before and after its request."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from slr_core.errors import SLRError

from .connection_limit import Admitted, ConnectionLimit
from .errors import HeadersTooSlow, InvalidHTTP, TooManyHeaders, to_problem
from .middleware import REQUEST_ID
from .observability.access_log import AccessLogEntry, log_access
from .observability.metrics import Metrics
from .observability.request_stats import RequestStats, request_stats

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers: the connection is closed beyond this. The application's own limit is lower."""
MAX_CHUNKS = 16_384
"""Chunks of a body: the parser takes some microseconds for each, however small it is."""
MAX_CHUNK_OVERHEAD = 1 << 20
"""Bytes of chunk headers, extensions and trailers of a body."""
PROBE_HEAD_S = 1.0
"""Seconds for the headers on a connection beyond the limit, which is there for health checks."""
_SINGLE_HEADERS = {b"host": "Host", b"authorization": "Authorization", b"content-type": "Content-Type"}
"""Headers that a request may have once: of two, a proxy might read the other one. The parser checks Content-Length."""
_HOST = re.compile(rb"(\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(:[0-9]*)?")
"""A host and a port, as a URL has them."""
LINGER_S = 1.0
"""Seconds for a client that is still sending to read the response that ends its connection."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of each connection, and where refusals are counted.

    Attributes:
        body_bytes: maximum size of a request body.
        head_timeout_s: seconds in which the first byte of a connection, and then all headers of a request, must arrive.
        connections: how many there may be.
        metrics: of the server.
    """

    body_bytes: int
    head_timeout_s: float
    connections: ConnectionLimit
    metrics: Metrics


class _ResponseWriter:
    """The transport of a response. Its connection decides how it is closed."""

    def __init__(self, connection: Connection) -> None:
        self.write: Callable[[bytes], None] = connection.transport.write
        self.is_closing, self.close = connection.transport.is_closing, connection.close_after_response


class _UnchunkedWriter(_ResponseWriter):
    """The same for HTTP/1.0, which knows no chunks: the body of a stream ends with the connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._write, self.write = connection.transport.write, self._write_head

    def _write_head(self, data: bytes) -> None:
        head = data.replace(b"transfer-encoding: chunked\r\n", b"")
        self.write = self._write if head == data else self._write_chunk
        self._write(head)

    def _write_chunk(self, data: bytes) -> None:
        size, _, content = data.partition(b"\r\n")
        self._write(content[: int(size or b"0", 16)])


class _BodyReader:
    """Callbacks for the body of a request that asks for another protocol, which httptools would skip."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.on_body, self.on_chunk_header = connection.on_body, connection.on_chunk_header

    def on_message_complete(self) -> None:
        """End the request; what follows is dropped."""
        self._connection.on_message_complete()
        self._connection.drop_rest()


class Connection(HttpToolsProtocol):
    """A connection that answers one request at a time.

    - There is a limit on their number, see :class:`ConnectionLimit`.
    - Headers must arrive in time, and at most :data:`MAX_HEAD_BYTES` of them.
    - A body comes in at most :data:`MAX_CHUNKS` chunks.
    - A request for another protocol (``Upgrade``) is answered as any.
    - A response that is sent before the end of its request closes the connection, and the rest of the request is
      dropped unparsed.
    - Bytes that follow a request before its response is complete (pipelining) are dropped, and the connection closes
      after the response. It is read until then, so that a disconnect is noticed.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._received = 0
        """Bytes of the request that is arriving."""
        self._chunks = 0
        self._in_head = True
        """Whether the next byte belongs to a request line or a header."""
        self._discarding = False
        """Whether everything that still arrives is dropped."""
        self._keep_alive = False
        """Whether the request lets the connection stay open."""
        self._skipped_body = b""
        """Headers that frame the body which httptools skips."""
        self._admitted = Admitted.NOT
        self._head_timeout_s = limits.head_timeout_s
        self._error: SLRError | None = None
        """Why a callback has stopped the parser."""

    # -- the connection -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request's headers, unless there are too many connections."""
        super().connection_made(transport)
        self._writer = _ResponseWriter(self)
        self._admitted = self.limits.connections.open(self)
        if self._admitted is Admitted.FOR_PROBES:
            self._head_timeout_s = min(PROBE_HEAD_S, self._head_timeout_s)
        if self._admitted is Admitted.NOT:
            self._discarding = True
            self.limits.metrics.connection_refused()
            transport.abort()
        else:
            self._start_timer(self._head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer and tell the request in progress."""
        self._unset_keepalive_if_required()
        self.limits.connections.close(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, unless it can no longer matter."""
        if self._discarding:
            return
        if not self._received:
            self.limits.connections.mark_active(self)
        self._received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._skipped_body:
                self.parser = httptools.HttpRequestParser(_BodyReader(self))
                rest = b"POST / HTTP/1.1\r\n" + self._skipped_body + b"\r\n" + data[upgrade.args[0] :]
                self._received, self._skipped_body = 0, b""
                self.data_received(rest)
            elif data[upgrade.args[0] :]:
                self.drop_rest()
        except httptools.HttpParserError as error:
            if not self._discarding:
                self._refuse(self._error or InvalidHTTP(f"the request is not valid HTTP: {error}"))
            return
        if self._in_head:
            if self._received > MAX_HEAD_BYTES:
                self._refuse(TooManyHeaders(f"a request may have at most {MAX_HEAD_BYTES} bytes of headers"))
        elif self._received > MAX_HEAD_BYTES + MAX_CHUNK_OVERHEAD + self.limits.body_bytes:
            self._refuse(InvalidHTTP("the chunks of the body have too much overhead"))

    def close_after_response(self) -> None:
        """Close the connection. A client that is still sending can read the response before: closing with unread data
        resets the connection, and the response may be lost."""
        if self._in_head or self.transport.is_closing():
            self.transport.close()
        elif not self._discarding:
            self._discarding = True
            if self.transport.can_write_eof():  # not with TLS: there the client sees the end only when it is closed
                with suppress(OSError):  # the client has reset the connection
                    self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)

    def drop_rest(self) -> None:
        """Drop what still arrives, and close the connection after the response."""
        self._discarding = True
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def give_way(self) -> None:
        """Close the connection, which has no request, in favour of another."""
        self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self._in_head and not self.transport.is_closing():
            self.limits.connections.mark_idle(self)

    def shutdown(self) -> None:
        """Close the connection after the request in progress."""
        self._keep_alive = False
        super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is idle, or refuse a request whose headers are late."""
        if self._received and not self._discarding:
            self._refuse(HeadersTooSlow(f"the headers must arrive within {self._head_timeout_s:g} seconds"))
        else:
            super().timeout_keep_alive_handler()

    def _start_timer(self, seconds: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    # -- parser callbacks ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start a request, unless the previous one has no response yet."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.drop_rest()
            raise InvalidHTTP("pipelined")  # stops the parser
        self._start_timer(self._head_timeout_s)
        self._chunks = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, and drop a trailer."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the response."""
        self._unset_keepalive_if_required()
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(InvalidHTTP("the version must be HTTP/1.0 or HTTP/1.1"))
        self._check_target()
        names = [name for name, _ in self.headers]
        if version == "1.1" and b"host" not in names:
            self._stop(InvalidHTTP("a request must have one Host header"))
        for name, shown in _SINGLE_HEADERS.items():
            if names.count(name) > 1:
                self._stop(InvalidHTTP(f"a request must have one {shown} header"))
        if not all(_HOST.fullmatch(value) for name, value in self.headers if name == b"host"):
            self._stop(InvalidHTTP("the Host header must be a host, and a port if there is one"))
        framing = [(n, value) for n, value in self.headers if n in (b"content-length", b"transfer-encoding")]
        codings = [value.lower() for name, value in framing if name == b"transfer-encoding"]
        if codings and (version == "1.0" or codings != [b"chunked"]):
            self._stop(InvalidHTTP("the only transfer encoding is chunked, with HTTP/1.1"))
        if self.parser.should_upgrade():
            self._skipped_body = b"".join(b"%b: %b\r\n" % header for header in framing)
        stats = request_stats(cast(Scope, self.scope))  # the request has arrived now
        stats.probes_only = self._admitted is Admitted.FOR_PROBES
        super().on_headers_complete()
        self._in_head = False
        writer = _UnchunkedWriter(self) if version == "1.0" else self._writer
        self.cycle.transport = writer  # type: ignore[assignment]
        # Until the request is complete, a response closes the connection.
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive and not stats.probes_only, False

    def _check_target(self) -> None:
        try:
            httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            self._stop(InvalidHTTP("the target of a request must be a path or a URL"))

    def on_chunk_header(self) -> None:
        """Count a chunk of a body."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            self._stop(InvalidHTTP(f"a body may have at most {MAX_CHUNKS} chunks"))

    def on_message_complete(self) -> None:
        """End a request."""
        if self._skipped_body:
            return
        self._in_head, self._received = True, 0
        if not self.cycle.response_complete:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def _stop(self, error: SLRError) -> None:
        """Stop the parser; the request is refused with this error."""
        self._error = error
        raise error

    # -- refusals -----------------------------------------------------------------------------------

    def _refuse(self, error: SLRError) -> None:
        """Answer with an error and close, without the application."""
        problem, cycle = to_problem(error), self.cycle
        if self._in_head or cycle is None:
            stats = RequestStats(request_id=uuid.uuid4().hex, error=problem.code)
            self.limits.metrics.request_refused(problem.status)
            client = self.client[0] if self.client else "-"
            log_access(AccessLogEntry(client, method="-", path="-", status=problem.status, duration_s=0.0, stats=stats))
        else:  # the application logs and counts the request
            stats = request_stats(cast(Scope, cycle.scope))
            stats.request_id = stats.request_id or uuid.uuid4().hex
            stats.status, stats.error = problem.status, problem.code
            if cycle.response_started:
                self.transport.close()
                return
        response = problem.response()
        response.headers[REQUEST_ID], response.headers["connection"] = stats.request_id, "close"
        headers = [*self.server_state.default_headers, *response.raw_headers]
        head = [STATUS_LINE[problem.status], *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
        self.transport.write(b"".join([*head, bytes(response.body)]))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self._in_head = False
        self.close_after_response()
