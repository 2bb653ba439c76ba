"""The halting head, which learns when the loop should stop."""

from __future__ import annotations

from math import log

from torch import Tensor, nn


class HaltingHead(nn.Module):
    """``p_halt`` from a workspace's states: a linear probe on their mean (adaptive computation time: Graves, 2016).

    Untrained, it gives ``p_halt = 0.1`` for every state, so that it does not stop a loop.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.probe = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.probe.weight)
        nn.init.constant_(self.probe.bias, log(0.1 / 0.9))

    def forward(self, hidden: Tensor, valid_mask: Tensor | None) -> Tensor:
        """Probability of stopping, ``[...]`` fp32.

        Args:
            hidden: states ``[..., W, d]`` of a workspace.
            valid_mask: ``[..., W]`` bool, the positions that count, at least one; ``None``: all.
        """
        if valid_mask is None:
            mean = hidden.mean(-2)
        else:
            mean = hidden.masked_fill(~valid_mask[..., None], 0).sum(-2) / valid_mask.sum(-1, keepdim=True)
        probability: Tensor = self.probe(mean.to(self.probe.weight.dtype)).float().sigmoid().squeeze(-1)
        return probability
