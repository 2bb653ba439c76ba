"""Batches: a file of requests, answered in order into a file of responses, one line for each.

A line is the body of ``/generate``, with an optional ``id``, or a request of OpenAI's batch format (``custom_id``,
``method``, ``url``, ``body``). It is answered by the application of :mod:`slr_server.app`, without sockets: limits,
defaults and responses are those of a server. A repeated run continues after the last whole line of the output.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import httpx
from pydantic_core import from_json

from slr_core.errors import DataError

from .app import create_app
from .settings import ServerSettings

URLS = ("/generate", "/trace", "/v1/completions", "/v1/chat/completions")
"""Endpoints that a line can name."""
_DAY_S = 86400.0
_AHEAD = 4
"""Lines in progress, as a multiple of the slots: enough to keep the slots full while the oldest line is awaited."""


def batch_settings(**given: Any) -> ServerSettings:
    """Settings of an application that answers a batch: no keys, any host, no deadline, no reduced budgets.

    Args:
        given: settings of the model.
    """
    return ServerSettings(
        **given,
        api_keys=None,
        api_keys_file=None,
        admin_key=None,
        allowed_hosts="*",
        request_timeout_s=_DAY_S,
        elastic_floor=1.0,
        max_queue=1_000_000,
        max_requests=1_000_000,
    )


class BatchAnswerer:
    """Answers lines with an application; make it with :func:`open_answerer`.

    Attributes:
        at_once: lines that keep the engine busy.
    """

    def __init__(self, client: httpx.AsyncClient, slots: int) -> None:
        self._client, self.at_once = client, _AHEAD * slots

    async def answer(self, number: int, line: str) -> str:
        """The output line, without its end.

        Args:
            number: of the line, from 0.
            line: of the input.
        """
        try:
            request = _parse(line)
        except (ValueError, TypeError) as error:
            return _to_line({"error": {"type": "invalid_request_error", "message": str(error), "code": "invalid_json"}})
        if "custom_id" not in request and "url" not in request:
            identity = {"id": request.pop("id")} if "id" in request else {}
            response = await self._post("/generate", request)
            answered = response.json()
            if response.status_code == httpx.codes.OK and len(answered["results"]) == 1:
                answered = answered["results"][0]
            answered.pop("id", None)  # of the response: a line has its request's, by which it is recognized
            return _to_line({**identity, **answered})
        found: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": request.get("custom_id")}
        url, body = request.get("url"), request.get("body")
        if url not in URLS or not isinstance(body, dict) or request.get("method", "POST") != "POST":
            message = f"a request needs method POST, a url among {', '.join(URLS)}, and a body"
            return _to_line({**found, "response": None, "error": {"code": "invalid_request", "message": message}})
        response = await self._post(url, body)
        status = {"status_code": response.status_code, "request_id": response.headers.get("x-request-id")}
        return _to_line({**found, "response": {**status, "body": response.json()}, "error": None})

    async def _post(self, url: str, body: dict[str, Any]) -> httpx.Response:
        return await self._client.post(url, json={**body, "stream": False})


def _parse(line: str) -> dict[str, Any]:
    """A line as the server parses a body: no NaN, no lone surrogates, bounded depth. Its names can be written as JSON.

    Raises:
        TypeError: it is not an object.
        ValueError: it is not JSON.
    """
    record = from_json(line, allow_inf_nan=False)
    if not isinstance(record, dict):
        raise TypeError("a line must be a JSON object")
    json.dumps([record.get("id"), record.get("custom_id")], allow_nan=False)  # 1e400 is read as infinity
    return record


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


@asynccontextmanager
async def open_answerer(settings: ServerSettings) -> AsyncIterator[BatchAnswerer]:
    """Load the model; it is closed at the end of the context.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: an option cannot be used.
    """
    app = create_app(settings)
    await asyncio.to_thread(app.state.service.load)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client,
    ):
        yield BatchAnswerer(client, settings.slots)


async def run_batch(
    source: Path, output: Path, settings: ServerSettings, progress: Callable[[int], None] = lambda count: None
) -> int:
    """Answer all lines of a file that have no answer yet.

    Args:
        source: the input, UTF-8.
        output: appended to, in the order of the input; each line is written once it and all before it are answered.
        settings: from :func:`batch_settings`.
        progress: called with the number of written lines.

    Returns:
        The number of lines answered in this run.

    Raises:
        DataError: a file cannot be read or written, or the output is not that of this input.
    """
    done = resume(source, output)
    progress(done)
    lines = islice(read_lines(source), done, None)
    first = next(lines, None)
    if first is None:  # nothing is left: the model is not needed
        return 0
    count, pending = 0, deque[asyncio.Task[str]]()
    async with open_answerer(settings) as answerer:
        with open_output(output) as file:

            async def write_first() -> None:
                nonlocal count
                write_line(file, await pending.popleft())
                count += 1
                progress(done + count)

            try:
                for number, line in enumerate(chain([first], lines), start=done):
                    if len(pending) == answerer.at_once:
                        await write_first()
                    pending.append(asyncio.create_task(answerer.answer(number, line)))
                while pending:
                    await write_first()
            finally:
                for task in pending:
                    task.cancel()
    return count


def read_lines(source: Path) -> Iterator[str]:
    """The lines of the input, without their ends and a byte order mark. Characters that are not UTF-8 are replaced.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with source.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error


def open_output(output: Path) -> BinaryIO:
    """The output, to append to.

    Raises:
        DataError: it cannot be written.
    """
    try:
        return output.open("ab", buffering=0)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error


def write_line(file: BinaryIO, line: str) -> None:
    """Append a line by one write, so that a process that is killed leaves at most one incomplete line.

    Raises:
        DataError: it cannot be written.
    """
    left = memoryview(f"{line}\n".encode("utf-8", "surrogatepass"))
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise DataError(f"cannot write {file.name}: {error.strerror or error}; a repeated command continues") from error


def resume(source: Path, output: Path) -> int:
    """Cut off an incomplete last line of the output, and return the number of whole ones.

    Raises:
        DataError: a file cannot be read, or the output is not that of this input. Then it is left as it is.
    """
    if not output.exists():
        return 0
    try:
        if source.exists() and output.samefile(source):
            raise DataError(f"{output} is the input: name another file for the output")
        if not output.is_file():  # reading a pipe or a device might never end
            raise DataError(f"{output} is not a regular file, which a repeated command could continue")
        with output.open("r+b") as file:
            done, size, last, rest = 0, 0, b"", b""
            for line in file:
                if line.endswith(b"\n"):
                    done, size, last = done + 1, size + len(line), line
                else:
                    rest = line
            _check_output(source, output, done, last, rest)
            file.truncate(size)
    except OSError as error:
        raise DataError(f"cannot continue {output}: {error.strerror or error}") from error
    return done


def _check_output(source: Path, output: Path, done: int, last: bytes, rest: bytes) -> None:
    """Check that the last of ``done`` whole lines, and the incomplete one after it, are answers to this input.

    Raises:
        DataError: they are not.
    """
    if not rest.startswith(b"{"[: len(rest)]):
        raise DataError(f"{output} exists, and its last line is not an answer: name another file for the output")
    if done:
        asked = next(islice(read_lines(source), done - 1, None), None)
        if asked is None:
            raise DataError(f"{output} has more lines than {source}")
        if _name(asked) != _name(last.decode("utf-8", "replace")):
            raise DataError(f"{output}, line {done}: answers another request than {source} has there")


def _name(line: str) -> Any:
    """By which an output line can be recognized: ``custom_id`` or ``id``; ``None`` if it has neither."""
    try:
        record = _parse(line)
    except (ValueError, TypeError):
        return None
    if "custom_id" in record or "url" in record:
        return record.get("custom_id")
    return record.get("id")
