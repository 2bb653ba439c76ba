"""Batches of a training from a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


class BatchLoader(DataLoader[Any]):
    """Reads a stream and makes its batches in another process, which ends with :meth:`close`.

    Args:
        stream: to read once.
        collate: makes a batch of what the stream gives.
    """

    def __init__(self, stream: IterableDataset[Any], collate: Callable[[Any], Any]) -> None:
        super().__init__(
            stream,
            batch_size=None,
            collate_fn=collate,
            num_workers=1,
            prefetch_factor=8,
            persistent_workers=True,  # until it is closed
            worker_init_fn=_ignore_interrupts,
            # Its own: the loader's seed would be drawn after the random state of a checkpoint was restored.
            generator=torch.Generator(),
        )

    def close(self) -> None:
        """End the process. The iterator's destructor would, but Python drops a Ctrl-C that arrives in a destructor."""
        iterator: Any = self._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the loader ends with the training, without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
