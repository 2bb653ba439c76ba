"""The loop sets that an engine serves, and whose adapters its bank holds."""

from __future__ import annotations

import logging
from collections.abc import Callable

from slr_core.engine.adapter_set import LoopAdapterSet, placed
from slr_core.engine.runner.lora_batch import LoraBatch, check_finite
from slr_core.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)


class LoopAdapterSets:
    """Loop sets by name. What changes the bank runs between two steps, all of it or nothing.

    Args:
        bank: holds the adapters of those that can be asked for, and of those that somebody still runs.
        own: the one that the engine started with; it stays.
        in_use: those that somebody runs or waits for.
        tune: called when the bank holds others than before.

    Raises:
        ConfigError: weights of ``own`` are not finite.

    Attributes:
        named: those that requests can ask for.
        held: those whose adapters are in the bank.
    """

    def __init__(
        self,
        bank: LoraBatch,
        own: LoopAdapterSet,
        *,
        in_use: Callable[[], set[LoopAdapterSet]],
        tune: Callable[[], None],
    ) -> None:
        check_finite(own.reasoner.base)
        self.bank, self.valid_mask, self.in_use, self.tune = bank, own, in_use, tune
        self.named = {own.name: own}
        self.held: set[LoopAdapterSet] = set()

    def find(self, name: str | None) -> LoopAdapterSet:
        """The loop set of this name, or the engine's own.

        Raises:
            RequestError: there is none.
        """
        try:
            return self.named[self.valid_mask.name if name is None else name]
        except KeyError:
            raise RequestError(f"loop_set must be one of {', '.join(self.named)}, got {name}", "loop_set") from None

    def check_free(self, name: str) -> None:
        """Raise ConfigError where a loop set has this name."""
        if name in self.named:
            raise ConfigError(f"there is a loop set {name!r} already")

    def add(self, loops: LoopAdapterSet) -> None:
        """Take requests for another one.

        Raises:
            ConfigError: the name is taken.
        """
        self.check_free(loops.name)
        self.fill(loops)
        self.named[loops.name] = loops

    def remove(self, name: str) -> None:
        """Take no more requests for one; :meth:`retire` frees its memory.

        Raises:
            ConfigError: there is none of this name, or it is the engine's own.
        """
        if name == self.valid_mask.name or name not in self.named:
            raise ConfigError(f"{name!r} is not a loop set that can be removed")
        del self.named[name]

    def fill(self, *added: LoopAdapterSet) -> None:
        """Give the bank its adapters, those of ``added`` with them."""
        sets = list(dict.fromkeys([*self.named.values(), *self.in_use(), *added]))
        adapters, places = placed(sets)
        self.bank.fill(adapters)
        for loops, own in places.items():
            loops.adapters = own
        self.held = set(sets)
        self.tune()

    def retire(self) -> None:
        """Drop the adapters of loop sets that were removed, once nobody runs them any longer."""
        retired = self.held - set(self.named.values())
        if not retired or retired <= self.in_use():
            return
        try:
            self.fill()
        except Exception:  # nobody waits for this, and whoever runs has what it needs
            logger.exception("adapters of removed loop sets stay until the next change")
            self.held -= retired
