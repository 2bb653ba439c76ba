"""The command ``slr-serve``."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError
from uvicorn.config import Config

from slr_core.errors import EngineError, SLRError

from .settings import Settings

if TYPE_CHECKING:
    from .service import Service


_MAX_HEAD_BYTES = 64 << 10
"""Request line and headers, beyond which the parser hangs up; the application's own limit is lower."""
_KEEP_ALIVE_S = 75
"""Longer than balancers keep idle connections (60 s is common): whoever closes first must not be the server, or a
request that is just being sent is lost."""
_FLUSH_S = 5
"""Seconds for the last answers to reach their clients."""


class _Server(uvicorn.Server):
    """Says when the model can be asked, ends when it never will, and lets what runs end when it is told to stop."""

    def __init__(self, config: Config, service: Service, address: str) -> None:
        super().__init__(config)
        self.service, self.address = service, address
        self._announced = self._told_to_stop = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told_to_stop:  # the second time somebody is in a hurry
            super().handle_exit(sig, frame)
        self._told_to_stop = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.broken:
            self.service.failure = EngineError("the engine has failed")
        if self.service.failure is not None:
            return True
        if self._told_to_stop:
            if self.service.draining is None:
                self.service.drain()
            elif self.service.draining.done():
                return True
        if self.service.ready and not self._announced:
            self._announced = True
            print(f"slr-serve: {self.service.settings.model_name} ready at {self.address}", flush=True)
        return await super().on_tick(counter)


def main() -> None:
    """Parse flags and environment, serve until told to stop."""
    # An orderly end, before the server has set up its own and after it has raised the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = CliApp.run(Settings)
    except (ValidationError, SettingsError) as error:
        _fail(_explain(error), 2)
    try:
        serve(settings)
    except KeyboardInterrupt:
        sys.exit(0)


def serve(settings: Settings) -> None:
    """Serve until a signal comes; exits with status 1 where that cannot begin."""
    # Here, so that --help and a wrong flag are answered without waiting for torch.
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from .app import create_app
    from .observability.access_log import handler

    disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler(settings)])
    try:
        app = create_app(settings)
    except SLRError as error:
        _fail(str(error))
    try:
        listener = _listen(settings)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error})")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    service: Service = app.state.service
    config = Config(
        app,
        lifespan="on",
        # The parser that bounds the headers, whatever else is installed.
        http="h11",
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # By then every request has been answered.
        timeout_graceful_shutdown=_FLUSH_S,
    )
    _Server(config, service, f"http://{host}:{listener.getsockname()[1]}").run([listener])
    if service.failure is not None:
        if not isinstance(service.failure, SLRError):
            raise service.failure
        _fail(str(service.failure))


def _listen(settings: Settings) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    # With the protocol spelled out, which socket.create_server does not: without it asyncio leaves Nagle's
    # algorithm on, and every response waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A client that never reads holds its connection until the kernel gives up on it: sooner than it would.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * settings.write_timeout_s))
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"slr-serve: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
