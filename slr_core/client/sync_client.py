"""The client for synchronous code."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import httpx
from httpx_retries import retry_request
from httpx_sse import connect_sse

from slr_core.client.core import (
    RETRIES,
    TIMEOUT_S,
    GenerateFields,
    ServerEvent,
    TraceFields,
    http_options,
    next_attempt,
    read_answer,
    read_event,
    retry_policy,
    stream_ended,
    to_error,
)
from slr_core.types import Messages


class Client:
    """Sends requests to a server; a context manager.

    Args:
        url: the server's URL.
        api_key: an API key of the server.
        timeout_s: longest time in seconds without data from the server.
        retries: how often a request is sent again; 0: never.
        transport: replaces the network.

    Raises:
        ConfigError: ``url`` is not a URL.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(url, api_key, timeout_s), transport=transport)
        self._retry = retry_policy(retries)

    def generate(self, prompt: str | list[str] | Messages, **fields: Unpack[GenerateFields]) -> dict[str, Any]:
        """``POST /generate``: the answer's JSON.

        Args:
            prompt: a text, several, or a chat.
            fields: other fields of the body.

        Raises:
            RequestError: the server refuses the request.
            EngineError: the server cannot be reached, is overloaded, or fails.
        """
        return self._send("POST", "/generate", {"prompt": prompt, **fields})

    def trace(self, prompt: str | list[str] | Messages, **fields: Unpack[TraceFields]) -> dict[str, Any]:
        """``POST /trace``: as :meth:`generate`, with a record of every iteration."""
        return self._send("POST", "/trace", {"prompt": prompt, **fields})

    def identity(self) -> dict[str, Any]:
        """``GET /checkpoint/identity``: hash of the served checkpoint and the precision of its weights, as JSON.

        Raises:
            RequestError: the server refuses the request.
            EngineError: as :meth:`generate`.
        """
        return self._send("GET", "/checkpoint/identity")

    def stream(
        self, prompt: str | list[str] | Messages, *, path: str = "/generate", **fields: Unpack[TraceFields]
    ) -> Iterator[ServerEvent]:
        """The events of ``/generate`` or ``/trace`` as they arrive; closing the iterator cancels the request.

        Raises:
            RequestError: as :meth:`generate`.
            EngineError: as :meth:`generate`, or the stream ended early.
        """
        body, retry = {"prompt": prompt, **fields, "stream": True}, self._retry
        while True:
            started = False
            failure: httpx.Response | httpx.TransportError
            try:
                with connect_sse(self._http, "POST", path, json=body) as source:
                    failure = source.response
                    if failure.status_code == 200:
                        for message in source.iter_sse():
                            event, started = read_event(message), True
                            yield event
                            if event.name == "done":
                                return
                        raise stream_ended()
                    failure.read()
            except httpx.TransportError as error:
                if started:
                    raise stream_ended(error) from error
                failure = error
            retry = next_attempt(retry, failure)
            retry.sleep(failure)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = retry_request(self._http, method, path, json=body, retry=self._retry)
        except httpx.TransportError as error:
            raise to_error(error) from error
        return read_answer(response)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
