"""Authentication by bearer keys: one set of keys for requests, one for administration."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Forbidden, Unauthorized, send_error
from .settings import HASH_PREFIX, split_list

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""Paths that need no key: orchestrators have none, and the answer is only yes or no."""
_PAGE_PREFIX = "/page/"
_ADMIN_PREFIX = "/admin/"


class KeyHashes:
    """The hashes of some keys; the keys themselves are not kept.

    Args:
        keys: keys, or ``sha256:<hex>`` of keys, separated by commas; ``None``: no keys.
    """

    def __init__(self, keys: SecretStr | None) -> None:
        self._hashes = [
            key.removeprefix(HASH_PREFIX).lower() if key.startswith(HASH_PREFIX) else _sha256(key.encode())
            for key in ([] if keys is None else split_list(keys.get_secret_value()))
        ]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def matches(self, key: bytes) -> bool:
        """Whether the key is one of them, in constant time."""
        given = _sha256(key)
        # Compare with all of them: stopping at the first match would reveal its position.
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(matches)


class Auth:
    """Requires the key that a path needs.

    With API keys, every path but the probes, the page and its files needs one: the page holds no data, and its own
    requests carry the key. Paths under /admin need the admin key, which is valid for all other paths too; without an
    admin key they are disabled.
    """

    def __init__(self, app: ASGIApp, api_keys: SecretStr | None, admin_key: SecretStr | None) -> None:
        self.app, self.api, self.admin = app, KeyHashes(api_keys), KeyHashes(admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and not _is_public(scope):
            error = self._check(scope)
            if error is not None:
                await send_error(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> Exception | None:
        is_admin = scope["path"].startswith(_ADMIN_PREFIX)
        if is_admin and not self.admin:
            return Forbidden("the admin endpoints are disabled: this server has no admin key")
        if not (is_admin or self.api):
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Header values are decoded as Latin-1.
        given = key.strip().encode("latin-1")
        if scheme.lower() == "bearer" and (self.admin.matches(given) or (not is_admin and self.api.matches(given))):
            return None
        return Unauthorized("a valid key is required: Authorization: Bearer <key>")


def accepts_html(headers: Headers) -> bool:
    """Whether the client is a browser that opens a page."""
    return "text/html" in headers.get("accept", "")


def _is_public(scope: Scope) -> bool:
    path: str = scope["path"]
    if path in PROBES or path.startswith(_PAGE_PREFIX):
        return True
    return path == "/" and scope["method"] == "GET" and accepts_html(Headers(scope=scope))


def _sha256(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
