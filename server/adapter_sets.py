"""The operator's folder of loop adapter sets. Clients can load what it holds, by name, and nothing else."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from threading import Event

from slr_core.engine import Engine
from slr_core.errors import CheckpointError, ConfigError

from .errors import Conflict, NotFound, TimedOut
from .protocol.operation import is_name
from .threads import run_in_daemon


class AdapterSetFolder:
    """Loads and removes loop adapter sets, one at a time.

    Args:
        folder: its direct subfolders can be loaded; ``None``: nothing can.
        timeout_s: time limit of a load.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: str | None, timeout_s: float) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"loop_sets: there is no folder {folder}")
        self._folder, self._timeout_s = folder, timeout_s
        self._lock = asyncio.Lock()
        self._loading: asyncio.Future[None] | None = None
        """The last load. It may still run, although nobody waits for it: a thread cannot be interrupted."""

    def available(self) -> list[str]:
        """Names of the subfolders that can be loaded: others have names that no request can send.

        A name from a request is looked up here and never used as a path.
        """
        if self._folder is None:
            return []
        try:
            return sorted(
                entry.name for entry in Path(self._folder).iterdir() if is_name(entry.name) and entry.is_dir()
            )
        except OSError:
            return []

    async def load(self, engine: Engine, name: str) -> None:
        """Load a subfolder into the engine.

        Raises:
            NotFound: the folder has none of this name.
            Conflict: one of this name is loaded, the checkpoint does not fit the served base model, or an earlier load
                that was given up still runs.
            TimedOut: it takes longer than the time limit. If it ends nevertheless, the set is removed again.
        """
        async with self._lock:
            if name in engine.loop_sets:
                raise Conflict(f"a loop adapter set {name!r} is already loaded")
            names = await asyncio.to_thread(self.available)
            if name not in names or self._folder is None:
                raise NotFound(f"the server's --loop-sets folder has no {name!r}", param="name")
            path = str(Path(self._folder) / names[names.index(name)])
            if self._loading is not None and not self._loading.done():
                raise Conflict("a load that was given up has not ended yet, try again later")
            given_up = Event()
            self._loading = run_in_daemon(partial(_load, engine, name, path, given_up))
            try:
                async with asyncio.timeout(self._timeout_s):
                    await asyncio.shield(self._loading)
            except (CheckpointError, ConfigError) as error:
                raise Conflict(f"{name!r} cannot be loaded: {str(error).replace(path, name)}") from error
            except TimeoutError as error:
                raise TimedOut(f"{name!r} was not loaded within {self._timeout_s:g} seconds") from error
            finally:
                given_up.set()

    async def remove(self, engine: Engine, name: str) -> None:
        """Remove a loop adapter set from the engine.

        Raises:
            NotFound: none of this name is loaded.
        """
        async with self._lock:
            if name not in engine.loop_sets:
                raise NotFound(f"no loop adapter set {name!r} is loaded", param="name")
            await asyncio.to_thread(engine.remove_loop_set, name)


def _load(engine: Engine, name: str, path: str, given_up: Event) -> None:
    engine.load_loop_set(name, path)
    if given_up.is_set():
        engine.remove_loop_set(name)
