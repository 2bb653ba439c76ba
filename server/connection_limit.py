"""How many connections may be open, and which one gives way to a new one."""

from __future__ import annotations

import resource
from enum import Enum
from typing import Protocol

from slr_core.errors import ConfigError

RESERVED_CONNECTIONS = 32
"""Connections beyond the limit, on which only health checks are answered."""
_OTHER_FILES = 64
"""Descriptors for everything that is not a client's connection."""


class Admitted(Enum):
    """What a new connection may do."""

    FULLY = "any request"
    FOR_PROBES = "health checks"
    NOT = "nothing"


class Closable(Protocol):
    """A connection, as far as the limit is concerned."""

    def give_way(self) -> None:
        """Close it; it has no request."""


class ConnectionLimit:
    """Keeps the number of open connections within ``limit``, and a few more for health checks.

    A new connection beyond it closes the one that has been idle longest after a response. If none is idle, it is
    admitted for health checks, and other requests on it are refused. If there are too many of these too, it closes the
    one that has been open longest without a byte, or is closed itself.

    Args:
        limit: maximum number of connections.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: set[Closable] = set()
        self._idle: dict[Closable, None] = {}
        """Those between two requests, idle for longest first."""
        self._silent: dict[Closable, None] = {}
        """Those that have sent nothing, the oldest first."""

    def __len__(self) -> int:
        return len(self._open)

    def open(self, connection: Closable) -> Admitted:
        """Count a new connection, unless it is not admitted. It is silent until :meth:`mark_active`."""
        admitted = Admitted.FULLY
        if len(self._open) >= self.limit and not self._close_oldest(self._idle):
            admitted = Admitted.FOR_PROBES
            if len(self._open) >= self.limit + RESERVED_CONNECTIONS and not self._close_oldest(self._silent):
                return Admitted.NOT
        self._open.add(connection)
        self._silent[connection] = None
        return admitted

    def mark_active(self, connection: Closable) -> None:
        """Record that a request has begun to arrive."""
        self._idle.pop(connection, None)
        self._silent.pop(connection, None)

    def mark_idle(self, connection: Closable) -> None:
        """Record that a connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def close(self, connection: Closable) -> None:
        """Stop counting a connection."""
        self.mark_active(connection)
        self._open.discard(connection)

    def _close_oldest(self, connections: dict[Closable, None]) -> bool:
        oldest = next(iter(connections), None)
        if oldest is None:
            return False
        self.close(oldest)
        oldest.give_way()
        return True


def max_connections(setting: int | None) -> int:
    """The maximum number of connections, for which the process may open enough files.

    Args:
        setting: the operator's; ``None``: as many as the limit of open files (RLIMIT_NOFILE) has room for.

    Raises:
        ConfigError: the limit of open files cannot be raised far enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = RESERVED_CONNECTIONS + _OTHER_FILES
    if setting is None:
        return 1 << 16 if soft == resource.RLIM_INFINITY else min(1 << 16, max(1, soft - others))
    if soft != resource.RLIM_INFINITY and setting + others > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (setting + others, hard))
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"max_connections: {setting} connections need {setting + others} open files, and the limit of this "
                f"process (ulimit -Hn) is {hard}"
            ) from error
    return setting
