"""The log: one line a request, as text or as JSON."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ..auth import PROBES
from ..settings import Settings
from .request_stats import RequestStats

access = logging.getLogger("slr.access")
_QUIET = PROBES | {"/metrics"}
"""Asked every few seconds by machines: these lines are for debugging."""


@dataclass(frozen=True)
class AccessLogEntry:
    """A request that has ended.

    Attributes:
        began_ns: when it came, in nanoseconds since 1970.
        traceparent: the caller's span, where it named one.
    """

    request_id: str
    client: str
    method: str
    path: str
    status: int
    began_ns: int
    duration_s: float
    traceparent: str | None
    stats: RequestStats

    def fields(self) -> dict[str, Any]:
        """What is logged of it."""
        stats, results = self.stats, self.stats.results
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            # The path arrives decoded: quoted again it cannot forge a second line.
            "path": quote(self.path),
            "status": self.status,
            "duration_s": round(self.duration_s, 6),
        }
        if stats.error is not None:
            fields["error"] = stats.error
        if stats.answers:
            fields["answers"] = stats.answers
            fields["stream"] = stats.stream
            if stats.loop_set is not None:
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
    """Write its line."""
    level = logging.DEBUG if entry.path in _QUIET else logging.INFO
    if access.isEnabledFor(level):
        access.log(level, "request", extra={"fields": entry.fields()})


def _plain(value: Any) -> str:
    bare = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
    return str(value) if bare else json.dumps(value)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        told = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        line = super().format(record)
        return f"{line} {told}" if told else line


class _JSON(logging.Formatter):
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


def handler(settings: Settings) -> logging.Handler:
    """Writes to standard error, in the form that the settings name."""
    made = logging.StreamHandler()
    text = _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
    made.setFormatter(_JSON() if settings.log_format == "json" else text)
    return made
