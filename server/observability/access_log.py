"""The log: one line per request, as text or as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ..auth import PROBES
from ..settings import ServerSettings
from .log_writer import LogWriter, write_stderr
from .request_stats import RequestStats

access = logging.getLogger("slr.access")
_QUIET = PROBES | {"/metrics"}
"""Paths that machines poll every few seconds: logged at level debug."""


@dataclass(frozen=True)
class AccessLogEntry:
    """A request that has ended.

    Attributes:
        client: the client's address.
        status: the status that counts; 499 if the client disconnected.
        stats: what is known about it besides.
    """

    client: str
    method: str
    path: str
    status: int
    duration_s: float
    stats: RequestStats

    def fields(self) -> dict[str, Any]:
        """The fields of its log line."""
        stats, results = self.stats, self.stats.results
        fields: dict[str, Any] = {
            "request_id": stats.request_id,
            "client": self.client,
            "method": self.method,
            # The path arrives decoded. Quoted again, it cannot forge a second line.
            "path": quote(self.path),
            "status": self.status,
            "duration_s": round(self.duration_s, 6),
        }
        if stats.error is not None:
            fields["error"] = stats.error
        if stats.answers:
            fields["answers"] = stats.answers
            fields["stream"] = stats.stream
            fields["loop_set"] = stats.loop_set
        if results:
            fields["prompt_tokens"] = sum(result.prompt_tokens for result in results)
            fields["completion_tokens"] = sum(result.completion_tokens for result in results)
            fields["iterations"] = [result.iterations for result in results]
            fields["exit_reasons"] = [result.exit_reason for result in results]
            fields["budget_reduced"] = stats.reduced
            assert stats.timings is not None
            fields.update({name: round(seconds, 6) for name, seconds in vars(stats.timings).items()})
        return fields


def log_access(entry: AccessLogEntry) -> None:
    """Write the line of a request."""
    level = logging.DEBUG if entry.path in _QUIET else logging.INFO
    if access.isEnabledFor(level):
        access.log(level, "request", extra={"fields": entry.fields()})


def _as_text(value: Any) -> str:
    needs_no_quotes = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
    return str(value) if needs_no_quotes else json.dumps(value)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        pairs = [f"{name}={_as_text(value)}" for name, value in fields.items()]
        return " ".join([super().format(record), *pairs])


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True)


def log_handler(settings: ServerSettings, write: Callable[[bytes], None] = write_stderr) -> logging.Handler:
    """A handler that writes to standard error, without blocking, in the format of the settings."""
    handler = LogWriter(write)
    text = _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JSONFormatter() if settings.log_format == "json" else text)
    return handler
