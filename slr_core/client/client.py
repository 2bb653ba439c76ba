"""A client of the server, sync and async: answers as JSON, streams as events, refusals as errors.

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("Is Max a rompus?", max_iterations=8)["results"][0]["text"])
        for event in client.stream("Is Max a rompus?"):
            print(event.name, event.data)

A request that the server has no room for (429), or no engine for yet (503), is sent again: after as long as its
``Retry-After`` asks, or after longer and longer pauses where it does not. So is one whose connection failed before
anything was answered. A stream is only begun again before its first event.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from slr_core.errors import EngineError, RequestError

_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 60.0
_AGAIN = (429, 503)


@dataclass(frozen=True)
class ServerEvent:
    """Something that a stream tells.

    Attributes:
        name: ``iteration``, ``token`` or ``result``; ``done`` is the last.
        data: its JSON.
    """

    name: str
    data: dict[str, Any]


class _Base:
    def __init__(self, *, api_key: str | None, timeout_s: float, retries: int) -> None:
        self.retries = retries
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = httpx.Timeout(timeout_s)

    def _pause(self, attempt: int, failed: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds before the next attempt; ``None`` where there is to be none."""
        if attempt >= self.retries:
            return None
        if isinstance(failed, httpx.Response):
            if failed.status_code not in _AGAIN:
                return None
            asked = failed.headers.get("Retry-After", "")
            if asked.isdecimal():
                return min(float(asked), _LONGEST_PAUSE_S)
        elif not isinstance(failed, httpx.ConnectError | httpx.RemoteProtocolError | httpx.ReadError):
            return None
        # Not all at the same moment.
        pause: float = min(_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
        return pause * random.uniform(0.5, 1.5)


class Client(_Base):
    """Asks a server; a context manager.

    Args:
        url: where it listens.
        api_key: a key of the server.
        timeout_s: how long it may stay silent.
        retries: how often a request is sent again; 0: never.
        transport: in place of the network.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.Client(base_url=url, headers=self._headers, timeout=self._timeout, transport=transport)

    def generate(self, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        """``POST /generate``: the answer's JSON. ``fields`` are those of the request.

        Raises:
            RequestError: the server refuses the request.
            EngineError: it cannot be reached, has no room, or fails.
        """
        return self._ask("/generate", {"prompt": prompt, **fields})

    def trace(self, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        """``POST /trace``, otherwise as :meth:`generate`."""
        return self._ask("/trace", {"prompt": prompt, **fields})

    def stream(self, prompt: str | list[str], *, path: str = "/generate", **fields: Any) -> Iterator[ServerEvent]:
        """The events of ``/generate`` or ``/trace`` as they come; leaving the iteration ends the request.

        Raises:
            RequestError: as :meth:`generate`.
            EngineError: as :meth:`generate`, or the stream broke off.
        """
        attempt, body = 0, {"prompt": prompt, **fields, "stream": True}
        while True:
            begun = False
            try:
                with self._http.stream("POST", path, json=body) as response:
                    if response.status_code == 200:
                        for event in _events(response.iter_lines()):
                            begun = True
                            yield event
                            if event.name == "done":
                                return
                        raise EngineError("the stream broke off")
                    response.read()
                    failed: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                if begun:
                    raise EngineError(f"the stream broke off: {error}") from error
                failed = error
            pause = self._pause(attempt, failed)
            if pause is None:
                raise _error(failed)
            time.sleep(pause)
            attempt += 1

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                response = self._http.post(path, json=body)
                if response.status_code == 200:
                    return _json(response)
                failed: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                failed = error
            pause = self._pause(attempt, failed)
            if pause is None:
                raise _error(failed)
            time.sleep(pause)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Base):
    """The same for asyncio; an async context manager. Arguments as for :class:`Client`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.AsyncClient(base_url=url, headers=self._headers, timeout=self._timeout, transport=transport)

    async def generate(self, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        """As :meth:`Client.generate`."""
        return await self._ask("/generate", {"prompt": prompt, **fields})

    async def trace(self, prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        """As :meth:`Client.trace`."""
        return await self._ask("/trace", {"prompt": prompt, **fields})

    async def stream(
        self, prompt: str | list[str], *, path: str = "/generate", **fields: Any
    ) -> AsyncIterator[ServerEvent]:
        """As :meth:`Client.stream`."""
        attempt, body = 0, {"prompt": prompt, **fields, "stream": True}
        while True:
            begun = False
            try:
                async with self._http.stream("POST", path, json=body) as response:
                    if response.status_code == 200:
                        reader = _Reader()
                        async for line in response.aiter_lines():
                            event = reader.take(line)
                            if event is None:
                                continue
                            begun = True
                            yield event
                            if event.name == "done":
                                return
                        raise EngineError("the stream broke off")
                    await response.aread()
                    failed: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                if begun:
                    raise EngineError(f"the stream broke off: {error}") from error
                failed = error
            pause = self._pause(attempt, failed)
            if pause is None:
                raise _error(failed)
            await asyncio.sleep(pause)
            attempt += 1

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                response = await self._http.post(path, json=body)
                if response.status_code == 200:
                    return _json(response)
                failed: httpx.Response | httpx.TransportError = response
            except httpx.TransportError as error:
                failed = error
            pause = self._pause(attempt, failed)
            if pause is None:
                raise _error(failed)
            await asyncio.sleep(pause)
            attempt += 1

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Reader:
    """Server-sent events from lines; an error event is raised."""

    def __init__(self) -> None:
        self._name = ""

    def take(self, line: str) -> ServerEvent | None:
        if line.startswith("event: "):
            self._name = line.removeprefix("event: ")
        if not line.startswith("data: "):
            return None
        try:
            data = json.loads(line.removeprefix("data: "))
        except ValueError as error:
            raise EngineError(f"the stream is not to be understood: {line[:100]}") from error
        if self._name == "error":
            raise EngineError(f"the stream broke off: {data['error']['message']}")
        return ServerEvent(self._name, data)


def _events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    reader = _Reader()
    for line in lines:
        event = reader.take(line)
        if event is not None:
            yield event


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = response.json()
    except ValueError as error:
        raise EngineError(f"{response.url}: the answer is not JSON") from error
    return answer


def _error(failed: httpx.Response | httpx.TransportError) -> RequestError | EngineError:
    if isinstance(failed, httpx.TransportError):
        return EngineError(f"the server cannot be reached: {failed or type(failed).__name__}")
    param = None
    try:
        detail = failed.json()["error"]
        message, param = str(detail["message"]), detail["param"]
    except (ValueError, KeyError, TypeError):  # somebody else's error: a proxy's page
        message = failed.reason_phrase
    told = f"{failed.status_code}, {message}"
    # What may go well later, or elsewhere, is no fault of the request.
    if 400 <= failed.status_code < 500 and failed.status_code not in (408, 429):
        return RequestError(told, param)
    return EngineError(told)
