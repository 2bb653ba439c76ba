"""The loop adapter sets that an engine serves."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slr_core.engine.adapter_set import LoopAdapterSet, number_adapters
from slr_core.engine.runner.lora_batch import LoraBatch, check_finite
from slr_core.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

DEFAULT_LOOP_SET = "default"
"""Name of the loop adapter set that an engine starts with."""
TUNED_PROMPT_TOKENS = 16
"""Length of the prompts for which the LoraBatch is tuned, in the workspace ``prompt``."""


class LoopAdapterSets:
    """Loop adapter sets by name. A change runs between two steps, and happens completely or not at all.

    Args:
        lora_batch: holds the adapters of all sets that requests can choose or still run with.
        default: the set that the engine starts with. It cannot be removed.
        tuned_rows: the number of rows for which the LoraBatch is tuned after every change.
        in_use: returns the sets of waiting and running requests.
        on_unused: called when the last lease of a removed set has ended, on the thread that ends it.

    Raises:
        ConfigError: weights of ``default`` are not finite.

    Attributes:
        by_name: sets that requests can choose.
        held: sets whose adapters are in the LoraBatch.
    """

    def __init__(
        self,
        lora_batch: LoraBatch,
        default: LoopAdapterSet,
        *,
        tuned_rows: int,
        in_use: Callable[[], set[LoopAdapterSet]],
        on_unused: Callable[[], None],
    ) -> None:
        check_finite(default.reasoner.base)
        self.lora_batch, self.default, self.tuned_rows = lora_batch, default, tuned_rows
        self._in_use, self._on_unused = in_use, on_unused
        self.by_name = {default.name: default}
        self.held: set[LoopAdapterSet] = set()
        self._leases: Counter[LoopAdapterSet] = Counter()
        self._lock = threading.Lock()

    def find(self, name: str | None) -> LoopAdapterSet:
        """The set of this name; ``None``: the default one.

        Raises:
            RequestError: there is none.
        """
        try:
            return self.by_name[self.default.name if name is None else name]
        except KeyError:
            raise RequestError(f"loop_set must be one of {', '.join(self.by_name)}, got {name}", "loop_set") from None

    @contextmanager
    def lease(self, wanted: str | LoopAdapterSet | None) -> Iterator[LoopAdapterSet]:
        """Keep the adapters of a set loaded while the context lasts, even if the set is removed meanwhile. Thread-safe.

        Args:
            wanted: a name, a set that :meth:`find` returned, or ``None`` for the default set.

        Raises:
            RequestError: there is none of this name, or the set has been removed.
        """
        with self._lock:
            found = wanted if isinstance(wanted, LoopAdapterSet) else self.find(wanted)
            if self.by_name.get(found.name) is not found and not self._leases[found]:
                raise RequestError(f"loop_set {found.name} has been removed", "loop_set")
            self._leases[found] += 1
        try:
            yield found
        finally:
            with self._lock:
                self._leases[found] -= 1
                unused = not self._leases[found] and self.by_name.get(found.name) is not found
                self._leases += Counter()  # drops zeros
            if unused:
                self._on_unused()

    def in_use(self) -> set[LoopAdapterSet]:
        """Sets that are leased, or that a request waits for or runs with."""
        with self._lock:
            leased = set(self._leases)
        # After the leases: a request is submitted before its lease ends.
        return leased | self._in_use()

    def check_free(self, name: str) -> None:
        """Check that no set has this name.

        Raises:
            ConfigError: one has.
        """
        if name in self.by_name:
            raise ConfigError(f"there is a loop adapter set {name!r} already")

    def add(self, adapter_set: LoopAdapterSet) -> None:
        """Accept requests for another set.

        Raises:
            ConfigError: the name is taken.
        """
        self.check_free(adapter_set.name)
        self.update_adapters(adapter_set)
        self.by_name[adapter_set.name] = adapter_set

    def remove(self, name: str) -> None:
        """Accept no more requests for a set; :meth:`drop_unused` frees its memory.

        Raises:
            ConfigError: there is none of this name, or it is the default one.
        """
        with self._lock:
            if name == self.default.name or name not in self.by_name:
                raise ConfigError(f"{name!r} is not a loop adapter set that can be removed")
            del self.by_name[name]

    def update_adapters(self, *added: LoopAdapterSet) -> None:
        """Fill the LoraBatch with the adapters of all sets in use and of ``added``."""
        sets = list(dict.fromkeys([*self.by_name.values(), *self.in_use(), *added]))
        adapters, ids = number_adapters(sets)
        self.lora_batch.set_adapters(adapters)
        for adapter_set, own_ids in ids.items():
            adapter_set.adapter_ids = own_ids
        self.held = set(sets)
        self.tune()

    def tune(self) -> None:
        """Choose how the LoraBatch computes, by measurement on the current number of threads."""
        workspace = self.default.workspace
        width = 1 if workspace.per_token else workspace.width(TUNED_PROMPT_TOKENS)
        chosen = self.lora_batch.tune(self.tuned_rows, width)
        logger.debug("LoRA batch: %d adapters, %s", self.lora_batch.count, chosen)

    def drop_unused(self) -> None:
        """Drop the adapters of removed sets that no request runs with any longer."""
        removed = self.held - set(self.by_name.values())
        if not removed or removed <= self.in_use():
            return
        try:
            self.update_adapters()
        except Exception:  # no caller waits for this, and running requests have their adapters
            logger.exception("Adapters of removed loop adapter sets stay loaded until the next change")
            self.held -= removed
