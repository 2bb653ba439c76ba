"""Means of the loss terms, and of other values, between two logs of a training."""

from __future__ import annotations

import torch
from torch import Tensor


class TermLog:
    """Adds up loss terms and other values until the next log, on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._counted: dict[str, Tensor] = {}
        self._known: set[str] = set()

    def add(self, name: str, value: Tensor, count: Tensor | None = None) -> None:
        """Add a scalar; ``count`` is what a loss term is a mean over: of answers, states or tokens."""
        self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._steps[name] = self._steps.get(name, 0) + 1
        if count is not None and name not in self._known:
            self._counted[name] = self._counted.get(name, torch.zeros((), device=count.device)) + count

    def take_means(self) -> dict[str, Tensor]:
        """The mean of each value since the last call."""
        means = {name: total / self._steps[name] for name, total in self._sums.items()}
        self._sums, self._steps = {}, {}
        return means

    def take_empty(self) -> list[str]:
        """The loss terms since the last call that were means over nothing; each is named once in a training."""
        empty = [name for name, count in self._counted.items() if not count]
        self._known |= self._counted.keys()
        self._counted = {}
        return empty
