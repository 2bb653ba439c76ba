"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, Unpack

import httpx
from httpx_retries import aretry_request
from httpx_sse import aconnect_sse

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


class AsyncClient:
    """As :class:`slr_core.client.Client`, for asyncio; an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(url, api_key, timeout_s), transport=transport)
        self._retry = retry_policy(retries)

    async def generate(self, prompt: str | list[str] | Messages, **fields: Unpack[GenerateFields]) -> dict[str, Any]:
        """As :meth:`slr_core.client.Client.generate`."""
        return await self._send("POST", "/generate", {"prompt": prompt, **fields})

    async def trace(self, prompt: str | list[str] | Messages, **fields: Unpack[TraceFields]) -> dict[str, Any]:
        """As :meth:`slr_core.client.Client.trace`."""
        return await self._send("POST", "/trace", {"prompt": prompt, **fields})

    async def identity(self) -> dict[str, Any]:
        """As :meth:`slr_core.client.Client.identity`."""
        return await self._send("GET", "/checkpoint/identity")

    async def stream(
        self, prompt: str | list[str] | Messages, *, path: str = "/generate", **fields: Unpack[TraceFields]
    ) -> AsyncIterator[ServerEvent]:
        """As :meth:`slr_core.client.Client.stream`."""
        body, retry = {"prompt": prompt, **fields, "stream": True}, self._retry
        while True:
            started = False
            failure: httpx.Response | httpx.TransportError
            try:
                async with aconnect_sse(self._http, "POST", path, json=body) as source:
                    failure = source.response
                    if failure.status_code == 200:
                        async for message in source.aiter_sse():
                            event, started = read_event(message), True
                            yield event
                            if event.name == "done":
                                return
                        raise stream_ended()
                    await failure.aread()
            except httpx.TransportError as error:
                if started:
                    raise stream_ended(error) from error
                failure = error
            retry = next_attempt(retry, failure)
            await retry.asleep(failure)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await aretry_request(self._http, method, path, json=body, retry=self._retry)
        except httpx.TransportError as error:
            raise to_error(error) from error
        return read_answer(response)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
