"""Authentication by bearer keys: one set of keys for requests, one for administration."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from pydantic import SecretStr
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from slr_core.errors import ConfigError

from .errors import Forbidden, Unauthorized, send_error
from .settings import HASH_PREFIX, check_keys, split_list

logger = logging.getLogger(__name__)

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/health"})
"""Paths that need no key: orchestrators have none, and the answer is only yes or no."""
_PAGE_PREFIX = "/page/"
_ADMIN_PREFIX = "/admin/"
_MAX_FILE_BYTES = 1 << 20


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


class ApiKeys:
    """The keys of the settings, and those of a file that can be read again.

    Args:
        keys: as of :class:`KeyHashes`.
        path: the file: one key, or ``sha256:<hex>`` of one, a line; ``None``: there is no file.

    Raises:
        ConfigError: the file cannot be read, holds no key, or an invalid one.
    """

    def __init__(self, keys: SecretStr | None, path: str | None) -> None:
        self._given, self.path = KeyHashes(keys), path
        self._read = KeyHashes(None if path is None else _read_keys(path))

    def __bool__(self) -> bool:
        return bool(self._given) or self.path is not None

    def matches(self, key: bytes) -> bool:
        """As :meth:`KeyHashes.matches`."""
        return self._given.matches(key) | self._read.matches(key)

    def reload(self) -> None:
        """Read the file again. If it has a fault, log it and keep the keys."""
        if self.path is None:
            return
        try:
            self._read = KeyHashes(_read_keys(self.path))
        except ConfigError as error:
            logger.error("%s; the keys stay as they are", error)
        else:
            logger.info("read the API keys again from %s", self.path)


def _read_keys(path: str) -> SecretStr:
    """The keys of a file, separated by commas; empty lines and lines that begin with # are skipped."""
    try:
        if not Path(path).is_file():
            raise ConfigError(f"api_keys_file: {path} is not a file")
        if Path(path).stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"api_keys_file: {path} has more than {_MAX_FILE_BYTES} bytes")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
        return check_keys(SecretStr(",".join(line for line in lines if line and not line.startswith("#"))))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file: {path} cannot be read ({type(error).__name__})") from error
    except PydanticCustomError as error:
        raise ConfigError(f"api_keys_file: {path}: {error.message()}") from error


class Auth:
    """Requires the key that a path needs.

    With API keys, every path but the probes, the page and its files needs one: the page holds no data, and its own
    requests carry the key. Paths under /admin need the admin key, which is valid for all other paths too; without an
    admin key they are disabled.
    """

    def __init__(self, app: ASGIApp, api_keys: ApiKeys, admin_key: SecretStr | None) -> None:
        self.app, self.api, self.admin = app, api_keys, KeyHashes(admin_key)

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
        # Header values are decoded as Latin-1, in which the last byte of a character may look like a space.
        given = key.encode("latin-1").strip(b" ")
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
