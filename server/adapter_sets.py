"""The operator's folder of loop sets: what lies there may be loaded by name, and nothing else may."""

from __future__ import annotations

import asyncio
from pathlib import Path

from slr_core.engine import DEFAULT_LOOP_SET, Engine
from slr_core.errors import CheckpointError, ConfigError

from .errors import Conflict, NotFound


class AdapterSetFolder:
    """Loads and removes loop sets, one at a time.

    Args:
        folder: whose direct subfolders may be loaded; ``None``: nothing may.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._changing = asyncio.Lock()

    def available(self) -> list[str]:
        """The names in the folder. A name from a request is looked for here: no path is made of it."""
        if self._folder is None:
            return []
        try:
            return sorted(entry.name for entry in Path(self._folder).iterdir() if entry.is_dir())
        except OSError:
            return []

    async def load(self, engine: Engine, name: str) -> None:
        """Load one of them.

        Raises:
            NotFound: there is none of this name.
            Conflict: it is loaded already, or does not fit the served base model.
        """
        async with self._changing:
            if name in engine.loop_sets:
                raise Conflict(f"there is a loop set {name!r} already")
            names = await asyncio.to_thread(self.available)
            if name not in names or self._folder is None:
                raise NotFound(f"there is no {name!r} in the server's folder of loop sets", param="name")
            path = str(Path(self._folder) / names[names.index(name)])
            try:
                await asyncio.to_thread(engine.load_loop_set, name, path)
            except (CheckpointError, ConfigError) as error:
                raise Conflict(f"{name!r} cannot be loaded: {str(error).replace(path, name)}") from error

    async def remove(self, engine: Engine, name: str) -> None:
        """Remove a loaded one.

        Raises:
            NotFound: there is none of this name.
            Conflict: it is the server's own.
        """
        async with self._changing:
            if name == DEFAULT_LOOP_SET:
                raise Conflict("the server's own loop set cannot be removed")
            if name not in engine.loop_sets:
                raise NotFound(f"there is no loop set {name!r}", param="name")
            await asyncio.to_thread(engine.remove_loop_set, name)
