"""An in-process client that can disconnect at any time, which Starlette's test client cannot."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI


class Caller:
    """One request to an application. ``sent`` holds the messages of its response."""

    def __init__(self, app: FastAPI, path: str, body: Any) -> None:
        self.app, self.path, self.body = app, path, json.dumps(body).encode()
        self.sent: list[dict[str, Any]] = []
        self.heard = asyncio.Event()
        """Set when a part of the response body was sent."""
        self._left = asyncio.Event()
        self._asked = False

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.heard.set()

    async def call(self, state: dict[str, Any] | None = None) -> None:
        scope = {
            "state": state or {},
            "type": "http",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
            "http_version": "1.1",
        }
        await self.app(scope, self._receive, self._send)

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body").decode()
