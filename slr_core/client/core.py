"""What both clients share: the fields of a request, the retry policy, and reading answers, events and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypedDict

import httpx
from httpx_retries import Retry
from httpx_sse import ServerSentEvent, SSEError

from slr_core.errors import ConfigError, EngineError, RequestError

TIMEOUT_S = 120.0
RETRIES = 5
_RETRIED_STATUSES = (429, 503)
_RETRIED_ERRORS = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)


class ConvergenceFields(TypedDict, total=False):
    """The field ``convergence`` of a request."""

    criterion: str | None
    threshold: float | None
    patience: int | None


class NoiseFields(TypedDict, total=False):
    """The field ``initial_noise`` of a request."""

    scale: float
    seed: int | None


class GenerateFields(TypedDict, total=False):
    """The fields of ``POST /generate`` besides ``prompt`` and ``stream``; docs/server.md describes them."""

    max_iterations: int | None
    min_iterations: int | None
    convergence: ConvergenceFields | None
    initial_noise: NoiseFields | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | list[str] | None
    n: int | None
    loop_set: str | None


class TraceFields(GenerateFields, total=False):
    """The fields of ``POST /trace`` besides ``prompt`` and ``stream``."""

    top_tokens: int | None
    include_states: bool | None
    trace_tokens: int | None


@dataclass(frozen=True)
class ServerEvent:
    """One event of a stream.

    Attributes:
        name: ``iteration``, ``token`` or ``result``; ``done`` is the last.
        data: its JSON.
    """

    name: str
    data: dict[str, Any]


def retry_policy(retries: int) -> Retry:
    """Retry what may succeed later, after the pause that ``Retry-After`` names, or after growing pauses.

    Args:
        retries: how often a request is sent again; 0: never.
    """
    return Retry(
        total=retries,
        allowed_methods=["GET", "POST"],
        status_forcelist=_RETRIED_STATUSES,
        retry_on_exceptions=_RETRIED_ERRORS,
        backoff_factor=0.125,  # 0.25 s before the first retry, then doubled; up to half of it is left out at random
        backoff_jitter=0.5,
        max_backoff_wait=60.0,
    )


def http_options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of httpx's clients.

    Raises:
        ConfigError: ``url`` is not a URL.
    """
    try:
        base_url = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url}: not a URL ({error})") from error
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": base_url, "headers": headers, "timeout": timeout_s}


def next_attempt(retry: Retry, failure: httpx.Response | httpx.TransportError) -> Retry:
    """The state of the retries before a request is sent again after ``failure``.

    Raises:
        RequestError: as :func:`to_error`, if it is not to be sent again.
        EngineError: the same.
    """
    is_temporary = (
        retry.is_retryable_status_code(failure.status_code)
        if isinstance(failure, httpx.Response)
        else retry.is_retryable_exception(failure)
    )
    if retry.is_exhausted() or not is_temporary:
        raise to_error(failure)
    return retry.increment()


def read_answer(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer.

    Raises:
        RequestError: the server refused the request.
        EngineError: it failed, or answered something else.
    """
    if response.status_code != 200:
        raise to_error(response)
    try:
        answer: dict[str, Any] = response.json()
    except ValueError as error:
        raise EngineError(f"{response.url}: the answer is not JSON") from error
    return answer


def read_event(event: ServerSentEvent) -> ServerEvent:
    """An event of a stream.

    Raises:
        EngineError: it reports an error, or is not JSON.
    """
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise EngineError(f"the stream has an event that is not JSON: {event.data[:100]}") from error
    if event.event == "error":
        raise stream_ended(data["error"]["message"])
    return ServerEvent(event.event, data)


def stream_ended(reason: object = "") -> EngineError:
    """The error for a stream that ended before its event ``done``."""
    return EngineError(f"the stream broke off{f': {reason}' if reason else ''}")


def to_error(failure: httpx.Response | httpx.TransportError) -> RequestError | EngineError:
    """The error for a request that failed: a ``RequestError`` only if sending it again is useless."""
    if isinstance(failure, SSEError):
        return EngineError(f"the answer is not an event stream: {failure}")
    if isinstance(failure, httpx.TransportError):
        return EngineError(f"the server cannot be reached: {failure or type(failure).__name__}")
    param = None
    try:
        detail = failure.json()["error"]
        message, param = str(detail["message"]), detail.get("param")
    except (ValueError, KeyError, TypeError):  # not one of the server's errors: a proxy's page
        message = failure.reason_phrase
    text = f"{failure.status_code}, {message}"
    if 400 <= failure.status_code < 500 and failure.status_code not in (408, 429):
        return RequestError(text, param)
    return EngineError(text)
