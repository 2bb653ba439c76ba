"""The loop adapter sets that an engine serves."""

from __future__ import annotations

import logging
from collections.abc import Callable

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
    ) -> None:
        check_finite(default.reasoner.base)
        self.lora_batch, self.default, self.tuned_rows, self.in_use = lora_batch, default, tuned_rows, in_use
        self.by_name = {default.name: default}
        self.held: set[LoopAdapterSet] = set()

    def find(self, name: str | None) -> LoopAdapterSet:
        """The set of this name; ``None``: the default one.

        Raises:
            RequestError: there is none.
        """
        try:
            return self.by_name[self.default.name if name is None else name]
        except KeyError:
            raise RequestError(f"loop_set must be one of {', '.join(self.by_name)}, got {name}", "loop_set") from None

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
