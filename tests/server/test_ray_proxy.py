"""The middleware of Ray Serve's proxies."""

import asyncio
import socket

import httpx
import uvicorn

from slr_server.ray_proxy import proxy_middlewares


def test_responses_are_sent_at_once():
    """On a listener like Ray's, of which asyncio does not know that it is TCP."""
    found = []

    def record_option(app):
        async def run(scope, receive, send):
            connection = send.__self__.transport.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await app(scope, receive, send)

        return run

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def ask(app):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient() as client:
            for _ in range(2):
                assert (await client.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")).status_code == 204
        server.should_exit = True
        await serving

    (middleware,) = proxy_middlewares()
    asyncio.run(ask(record_option(middleware.cls(answer))))
    assert found == [0, 1], "set by the first request on the connection"
