"""Sharded training: FSDP 2, as ``accelerate launch --config_file configs/accelerate/fsdp.yaml`` starts it."""

from __future__ import annotations

import os
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def is_sharded_run() -> bool:
    """Whether accelerate was told to shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def zero_of_all(module: nn.Module) -> Tensor | float:
    """Zero, whose gradient reaches all trainable parameters of a sharded module; 0.0 if it is not sharded.

    A batch may not use every iteration's adapter. Processes exchange only gradients that exist, so all must have the
    same ones. To be called in the module's ``forward``, where its parameters are whole.
    """
    if not isinstance(module, FSDPModule):
        return 0.0
    return torch.stack([0.0 * p.sum() for p in module.parameters() if p.requires_grad]).sum()


class WholeCopy:
    """An unsharded copy of a module, on the CPU, into which its weights are collected.

    Args:
        module: before it is sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = deepcopy(module).cpu()

    def fill(self, weights: dict[str, Tensor]) -> nn.Module:
        """The copy, with these weights: the whole ``state_dict`` of the sharded module."""
        self._module.load_state_dict(weights)
        return self._module
