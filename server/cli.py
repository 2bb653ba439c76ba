"""The command ``slr-serve``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import logging
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError
from uvicorn.config import Config

from slr_core._version import __version__
from slr_core.errors import EngineError, SLRError
from slr_core.suggest import did_you_mean

from .observability.loop_errors import LoopErrorLog
from .settings import ServerSettings

if TYPE_CHECKING:
    from .service import Service


_BACKLOG = 1024
"""Connections that wait for the event loop to accept them."""
_ACCEPTED_AT_ONCE = 64
"""Connections that are accepted before other events are handled."""
_KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (often 60 s). If the server closed them first, requests that are
being sent would be lost."""
_FLUSH_S = 5
"""Seconds for the last responses to reach their clients."""


class _Server(uvicorn.Server):
    """Announces when the server is ready, exits if the model cannot be loaded, and drains on SIGTERM and SIGINT."""

    def __init__(self, config: Config, service: Service, address: str) -> None:
        super().__init__(config)
        self.service, self.address = service, address
        self._announced = self._stop_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(LoopErrorLog())
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # asyncio takes the number that it accepts at once for the backlog, too

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop_requested:  # a second signal: do not wait for running requests
            super().handle_exit(sig, frame)
        self._stop_requested = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.broken:
            self.service.failure = EngineError("the engine has failed")
        if self.service.failure is not None:
            return True
        if self._stop_requested:
            if self.service.draining is None:
                self.service.drain()
            elif self.service.draining.done():
                return True
        if self.service.ready and not self._announced:
            self._announced = True
            # Garbage collections no longer visit the model's and the libraries' objects: a body of 260,000 lists is
            # then parsed in 0.2 s instead of 1.7 s.
            gc.collect()
            gc.freeze()
            print(f"slr-serve: {self.service.settings.model_name} ready at {self.address}", flush=True)
        return await super().on_tick(counter)


def main(arguments: list[str] | None = None) -> None:
    """Parse flags and environment, and serve until a signal comes.

    Args:
        arguments: flags; ``None``: those of the command line.
    """
    # For a clean exit before the server has installed its own handler, and after it raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
    except (ValidationError, SettingsError) as error:
        _fail(_explain(error), 2)
    try:
        serve(settings)
    except KeyboardInterrupt:
        sys.exit(0)


def read_settings(arguments: list[str]) -> ServerSettings:
    """The settings from flags, the environment and a file. Exits after ``--help`` and ``--version``.

    Raises:
        ValidationError: a value is wrong.
        SettingsError: a flag or a key is unknown, or the file cannot be read.
    """
    parser = _Parser(
        prog="slr-serve",
        description=inspect.getdoc(ServerSettings),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slr-serve {__version__}")
    source: CliSettingsSource[ServerSettings] = CliSettingsSource(
        ServerSettings, root_parser=parser, parse_args_method=_Parser.parse_args
    )
    return CliApp.run(ServerSettings, arguments, cli_settings_source=source)


class _Parser(argparse.ArgumentParser):
    """Reports an unknown argument with the known flag that resembles it most."""

    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        known: argparse.Namespace
        known, unknown = self.parse_known_args(*arguments)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            raise SettingsError(f"unknown argument {unknown[0]}{did_you_mean(unknown[0].partition('=')[0], flags)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def serve(settings: ServerSettings) -> None:
    """Serve until a signal comes. Exits with status 1 if the server cannot start or the engine fails."""
    # Imported here, so that --help and wrong flags are answered without importing torch.
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from .app import create_app
    from .connection import Connection, ConnectionLimits
    from .connection_limit import ConnectionLimit, max_connections
    from .observability.access_log import log_handler

    disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    logging.basicConfig(level=settings.log_level.upper(), handlers=[log_handler(settings)])
    try:
        most = max_connections(settings.max_connections)
        app = create_app(settings)
    except SLRError as error:
        _fail(str(error))
    try:
        listener = _listen(settings)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error})")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    service: Service = app.state.service
    connections = ConnectionLimit(most)
    service.metrics.watch_connections(connections.__len__)
    limits = ConnectionLimits(settings.max_body_bytes, settings.head_timeout_s, connections, service.metrics)
    config = Config(
        app,
        lifespan="on",
        http=cast(type[Connection], partial(Connection, limits=limits)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    _Server(config, service, f"http://{host}:{listener.getsockname()[1]}").run([listener])
    if service.failure is not None:
        if not isinstance(service.failure, SLRError):
            raise service.failure
        _fail(str(service.failure))


def _listen(settings: ServerSettings) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    # socket.create_server does not set the protocol. Without it, asyncio leaves Nagle's algorithm on, and every
    # response waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # The connection of a client that never reads is closed by the kernel after this time.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * settings.write_timeout_s))
        listener.bind(address)
        # Here, because only this fails if another server listens on the port.
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())


def _fail(message: str, status: int = 1) -> NoReturn:
    print(f"slr-serve: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
