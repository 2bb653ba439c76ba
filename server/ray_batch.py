"""Batches on many machines: the lines of :mod:`slr_server.batch`, answered through Ray Data by engines on a cluster.

Needs the extra ``ray``. The cluster is that of ``RAY_ADDRESS``, or one on this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import ray.data

from slr_core.ray_cluster import connect, reported_errors

from .batch import batch_settings, open_answerer, open_output, read_lines, resume, write_line

LINES_AT_ONCE = 256
"""Lines that an engine gets at once. A killed engine loses as many, which another one answers again."""


class LineAnswerer:
    """An engine on the cluster.

    Args:
        given: as of :func:`slr_server.batch.batch_settings`.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._loop, self._stack = asyncio.new_event_loop(), AsyncExitStack()
        opening = self._stack.enter_async_context(open_answerer(batch_settings(**given)))
        self._answerer = self._loop.run_until_complete(opening)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer a batch of lines: columns ``number`` and ``line`` become the column ``output``."""
        return {"output": self._loop.run_until_complete(self._answer(batch))}

    async def _answer(self, batch: dict[str, Any]) -> list[str]:
        pairs = zip(batch["number"], batch["line"], strict=True)
        return await asyncio.gather(*(self._answerer.answer(int(number), str(line)) for number, line in pairs))


def run_ray_batch(
    source: Path,
    output: Path,
    given: dict[str, Any],
    engines: int,
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """As :func:`slr_server.batch.run_batch`, on a cluster.

    Args:
        source: the input.
        output: on this machine.
        given: as of :func:`slr_server.batch.batch_settings`; a model folder must exist on every machine.
        engines: number of engines, each with one CPU, and a GPU if the cluster has any and the device is not the CPU.
        progress: called with the number of written lines.
    """
    done = resume(source, output)
    progress(done)
    items = [{"number": n, "line": line} for n, line in enumerate(islice(read_lines(source), done, None), done)]
    if not items:
        return 0
    gpus = connect(given.get("device", "auto"))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answers = ray.data.from_items(items, override_num_blocks=-(-len(items) // LINES_AT_ONCE)).map_batches(
        LineAnswerer,
        fn_constructor_kwargs={"given": {"threads": 1, **given}},
        batch_size=LINES_AT_ONCE,
        concurrency=engines,
        num_cpus=1,
        num_gpus=gpus,
    )
    with open_output(output) as file, reported_errors():
        for count, row in enumerate(answers.iter_rows(), start=1):
            write_line(file, row["output"])
            progress(done + count)
    return len(items)
