"""A middleware of Ray Serve's HTTP proxies, which answer on a kept connection 40 ms late without it.

Ray calls :func:`proxy_middlewares` in each proxy if the environment of ``ray start`` has
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=slr_server.ray_proxy:proxy_middlewares``.
"""

from __future__ import annotations

import socket

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class SendAtOnce:
    """Sets TCP_NODELAY on the connection of each request.

    uvicorn writes the head of a response and its body separately. Without the option, the kernel holds the body back
    until the client has acknowledged the head, which Linux does after 40 ms. asyncio sets it only on sockets whose
    protocol number is given, and Ray's listener gives none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. ``send`` is a method of uvicorn's request cycle; with another server, nothing is set."""
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        connection = transport.get_extra_info("socket") if transport is not None else None
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """The middlewares, outermost last."""
    return [Middleware(SendAtOnce)]
