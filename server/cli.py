"""The command ``slr-serve``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import huggingface_hub.constants
import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError
from uvicorn.config import Config

from slr_core._version import __version__
from slr_core.errors import EngineError, SLRError
from slr_core.suggest import did_you_mean

from .observability.loop_errors import LoopErrorLog
from .settings import ServerSettings, plain_message
from .threads import start_daemon, unfinished

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .auth import ApiKeys
    from .service import Service


_BACKLOG = 1024
"""Connections that wait for the event loop to accept them."""
_ACCEPTED_AT_ONCE = 8
"""Connections that are accepted before other events are handled. The first bytes of a connection are read three turns
of the event loop later: if more than RESERVED_CONNECTIONS were accepted meanwhile, a health check would give way."""
_KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (often 60 s). If the server closed them first, requests that are
being sent would be lost."""
_FLUSH_S = 5
"""Seconds for the last responses to reach their clients."""
_END_S = 5.0
"""Seconds beyond the grace period and the last responses after which the process ends, whatever still runs."""
_END_NOW_S = 2.0
"""The same after a second signal, from the signal on."""


class _Server(uvicorn.Server):
    """Announces when the server is ready, exits if the model cannot be loaded, and drains on a signal.

    Signals are SIGTERM, SIGINT, and SIGHUP; with a file of API keys, SIGHUP reads them again instead. A second signal
    ends the grace period. A thread that hangs does not hold up the end: see :data:`_END_S`.
    """

    def __init__(self, config: Config, app: FastAPI, address: str) -> None:
        super().__init__(config)
        self.service: Service = app.state.service
        self.api_keys: ApiKeys = app.state.api_keys
        self.address = address
        self._announced = self._stop_requested = self._end_requested = self._keys_requested = False
        self._end_at = math.inf
        """``time.monotonic`` at which the process ends."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        # After nohup, SIGHUP is ignored.
        original = signal.getsignal(signal.SIGHUP)
        if self.api_keys.path is not None:
            signal.signal(signal.SIGHUP, self._request_keys)
        elif original != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            await super().serve(sockets)
        finally:
            signal.signal(signal.SIGHUP, original)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopErrorLog())
        if self.config.is_ssl:
            handshake_s = self.service.settings.head_timeout_s
            # uvicorn does not pass this on, and asyncio waits a minute for a handshake.
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=handshake_s)  # type: ignore[method-assign]
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_BACKLOG)  # asyncio takes the number that it accepts at once for the backlog, too

    def _request_keys(self, sig: int, frame: FrameType | None) -> None:
        self._keys_requested = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._stop_requested:
            self._stop_requested = True
            self._end_at = time.monotonic() + self.service.settings.grace_s + _FLUSH_S + _END_S
            # Not a daemon thread of slr_server.threads: those are waited for.
            threading.Thread(target=self._end_in_time, name="slr-end", daemon=True).start()
        else:
            self._end_requested = True
            self._end_at = time.monotonic() + _END_NOW_S

    def _end_in_time(self) -> None:
        while time.monotonic() < self._end_at:
            time.sleep(0.05)
        logging.getLogger(__name__).error("shutdown takes too long: ending the process")
        _flush_log()
        os._exit(1)

    async def on_tick(self, counter: int) -> bool:
        if self.service.broken:
            self.service.failure = EngineError("the engine has failed")
        if self.service.failure is not None:
            return True
        if self._keys_requested:
            self._keys_requested = False
            self.api_keys.reload()
        if self._stop_requested:
            if self.service.draining is None:
                self.service.drain()
            elif self._end_requested:
                self.service.end_now()
                self.config.timeout_graceful_shutdown = 1
            if self.service.draining is not None and self.service.draining.done():
                return True
        if self.service.ready and not self._announced:
            self._announced = True
            # Garbage collections no longer visit the model's and the libraries' objects: a body of 260,000 lists is
            # then parsed in 0.2 s instead of 1.7 s.
            gc.collect()
            gc.freeze()
            if self.service.settings.offline:
                huggingface_hub.constants.HF_HUB_OFFLINE = True
            line = f"slr-serve: {self.service.settings.model_name} ready at {self.address}"
            start_daemon(partial(_print, line))  # standard output may be a pipe that nobody reads
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
    if unfinished():  # a load that was given up, or output that nobody reads
        _flush_log()
        os._exit(0)


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
    _import_transformers()
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

    from .app import create_app
    from .connection import Connection, ConnectionLimits
    from .connection_limit import ConnectionLimit, max_connections
    from .observability.access_log import log_handler

    disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    # Through the server's handler, which does not block.
    disable_default_handler()
    enable_propagation()
    logging.captureWarnings(True)
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
        loop="asyncio",  # not uvloop where it is installed: startup() sets an attribute of the loop
        http=cast(type[Connection], partial(Connection, limits=limits)),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    try:
        config.load()
    except OSError as error:
        _fail(f"ssl_certfile, ssl_keyfile: the certificate or its key cannot be used ({error.strerror or error})")
    start_daemon(partial(_build_openapi, app))
    scheme = "https" if config.is_ssl else "http"
    _Server(config, app, f"{scheme}://{host}:{listener.getsockname()[1]}").run([listener])
    if service.failure is not None:
        if not isinstance(service.failure, SLRError):
            raise service.failure
        _fail(str(service.failure))


def _import_transformers() -> None:
    """Import transformers' models without scipy and PIL, which take 40 MB: losses of images alone use them."""
    missing: Any = None  # as the entry of a module, it makes its import fail
    unused = [name for name in ("PIL", "scipy") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unused, missing))
    try:
        import_module("transformers.modeling_utils")
    finally:
        for name in unused:
            del sys.modules[name]


def _build_openapi(app: FastAPI) -> None:
    """Build the description of the endpoints, and keep it: else the first request for it would hold the event loop."""
    app.openapi()


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
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {plain_message(detail['msg'])}" for detail in error.errors()
    )


def _fail(message: str, status: int = 1) -> NoReturn:
    _flush_log()
    writing = start_daemon(partial(_print, f"slr-serve: error: {' '.join(message.split())}", "stderr"))
    writing.join(_FLUSH_S)
    if unfinished():
        os._exit(status)
    sys.exit(status)


def _flush_log() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()


def _print(line: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print a line. If the stream is closed, it and all later output are dropped."""
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        # The interpreter flushes the stream at its end, and would fail.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, stream).fileno())


if __name__ == "__main__":
    main()
