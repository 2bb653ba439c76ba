"""The Host header: a page that resolves its own name to a loopback address (DNS rebinding) is refused."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .auth import PROBES
from .errors import UnknownHost, send_error
from .settings import ServerSettings, split_list

_LOCAL = "."
"""Stands for IP addresses, localhost, and names without a dot, which no public domain has."""


def allowed_hosts(settings: ServerSettings) -> frozenset[str] | None:
    """What the Host header may be; ``None``: anything."""
    if settings.allowed_hosts is not None:
        names = frozenset(name.lower() for name in split_list(settings.allowed_hosts))
        return None if "*" in names else names
    is_local = settings.host == "localhost" or (_is_address(settings.host) and ip_address(settings.host).is_loopback)
    return frozenset({_LOCAL}) if is_local else None


class HostCheck:
    """Refuses requests whose Host header is not allowed. Health checks may use any.

    Args:
        allowed: from :func:`allowed_hosts`.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self.allowed is not None and scope["path"] not in PROBES:
            host = Headers(scope=scope).get("host")
            if host is not None and not self._allows(host):
                error = UnknownHost("the Host header does not name this server; --allowed-hosts sets its names")
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        assert self.allowed is not None
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.allowed:
            return True
        return _LOCAL in self.allowed and ("." not in name or name.endswith(".localhost") or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
