"""Bearer keys: who may ask, and who may change what is served."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Forbidden, Unauthorized, describe
from .settings import split

PROBES = frozenset({"/livez", "/readyz", "/startupz"})
"""What needs no key: whoever asks these has none, and learns nothing but yes or no."""
ADMIN = "/admin/"
_HASHED = "sha256:"


class Keys:
    """The hashes of some keys; the keys themselves are not kept.

    Args:
        listed: keys, or ``sha256:<hex>`` of keys, separated by commas.
    """

    def __init__(self, listed: SecretStr | None) -> None:
        keys = [] if listed is None else split(listed.get_secret_value())
        self._hashes = [
            key.removeprefix(_HASHED).lower() if key.startswith(_HASHED) else _sha256(key.encode()) for key in keys
        ]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def opened_by(self, key: bytes) -> bool:
        """Whether it is one of them; how long that takes says nothing of how much of it is right."""
        given = _sha256(key)
        # All of them: the first match does not end the comparison.
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(matches)


class Auth:
    """Lets through what carries the key that its path asks for. Everything but probes asks for one, if there are any;
    what lies under /admin asks for the admin key, which opens everything else too."""

    def __init__(self, app: ASGIApp, api_keys: SecretStr | None, admin_key: SecretStr | None) -> None:
        self.app, self.api, self.admin = app, Keys(api_keys), Keys(admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            error = self._refusal(scope)
            if error is not None:
                await describe(error).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Exception | None:
        administers = scope["path"].startswith(ADMIN)
        if administers and not self.admin:
            return Forbidden("the admin endpoints are off: this server has no admin key")
        if not (administers or self.api):
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Header values arrive as Latin-1.
        given = key.strip().encode("latin-1")
        if scheme.lower() == "bearer" and (
            self.admin.opened_by(given) or (not administers and self.api.opened_by(given))
        ):
            return None
        return Unauthorized("a valid key is needed: Authorization: Bearer <key>")


def _sha256(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
