"""The module that the Trainer trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slr_core.model.base_support import hidden_size
from slr_core.reasoner import LatentReasoner
from slr_core.training.config import TrainConfig
from slr_core.training.frozen import FrozenCopies, prefers_bfloat16
from slr_core.training.objectives import Mean, Rollout, check_defined, losses
from slr_core.training.sharded import zero_of_all
from slr_core.training.split_cache import split_attention


class LossModule(nn.Module):
    """Maps a batch to loss terms.

    Args:
        reasoner: the model to train.
        config: the recipe.
        teacher: a frozen model, for the objectives ``teacher_*``.

    Raises:
        ConfigError: a batch would have no loss term.
    """

    def __init__(self, reasoner: LatentReasoner, config: TrainConfig, teacher: LatentReasoner | None = None) -> None:
        super().__init__()
        check_defined(config)
        self.reasoner, self.teacher = reasoner, teacher
        self.recipe = config  # not `config`: the Trainer reads that name
        self.bridge: nn.Module | None = None
        self.bf16 = prefers_bfloat16(reasoner.base) if config.bf16 is None else config.bf16
        self._frozen: FrozenCopies | None = None
        if teacher is not None and config.objectives.teacher_states:
            self.bridge = nn.Linear(hidden_size(reasoner.base), hidden_size(teacher.base), bias=False)

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, Mean], dict[str, Tensor]]:
        """Unweighted loss terms, and other values to log."""
        base = self.reasoner.base
        with split_attention(base), self._precision():
            rollout = Rollout(self.reasoner, batch, self.recipe, self.teacher, self.bridge)
            terms, values = losses(rollout), _log_values(rollout)
            name = next(iter(terms))
            terms[name] = terms[name]._replace(total=terms[name].total + zero_of_all(self))
            return terms, values

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Inside, mixed precision if the recipe has it: frozen layers compute with copies of their weights."""
        if not self.bf16:
            yield
            return
        if self._frozen is None:  # not before the model has been moved to its device
            self._frozen = FrozenCopies(self.reasoner.base)
        with torch.autocast(self.reasoner.device.type, torch.bfloat16), self._frozen.use():
            yield


def _log_values(rollout: Rollout) -> dict[str, Tensor]:
    if rollout.iterations < 2:
        return {}
    last, before = rollout.states[:, -1].detach().float(), rollout.states[:, -2].detach().float()
    return {
        "state_norm": last.norm(dim=-1).mean(),
        "last_relative_change": ((last - before).norm(dim=-1) / before.norm(dim=-1)).mean(),
    }
