"""A client of the server: answers as JSON, streams as events, refusals as errors.

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("Is Max a rompus?", max_iterations=8)["results"][0]["text"])
        for event in client.stream("Is Max a rompus?"):
            print(event.name, event.data)

A request is sent again if the server is overloaded (429) or not ready (503), or if the connection fails before an
answer arrives: after the time that ``Retry-After`` names, or else after growing pauses. A stream is restarted only
before its first event.
"""

from slr_core.client.async_client import AsyncClient
from slr_core.client.core import ServerEvent
from slr_core.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "ServerEvent"]
