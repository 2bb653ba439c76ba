"""What an importer is: options in, a conversion out, and how its states compare with a peer's recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel

FIXED_LOOP: dict[str, Any] = {
    "projection": {"kind": "identity"},
    "timestep": {"kind": "none"},
    "lora": {"kind": "none"},
    "residual": {"source": "none"},
    # A chain of trained length: no early exit, and no guard that ends it.
    "convergence": {"criterion": "fixed"},
    "guard": {"expanding_iterations": 64, "norm_factor": 1e6},
}
"""Settings of every imported loop; a peer's module adds its own."""


@dataclass(frozen=True)
class ImportOptions:
    """What a user says about a checkpoint because no file of it does.

    Attributes:
        latents: number of thoughts, or of latent positions in all.
        iterations: number of loops over the latent positions.
        lora_alpha: alpha of a LoRA adapter.
        keep_eos: CODI was trained with ``--remove_eos False``.
        keep_adapter: write CODI's adapter as it is instead of merging it, so that several share one base.
    """

    latents: int | None = None
    iterations: int | None = None
    lora_alpha: float | None = None
    keep_eos: bool = False
    keep_adapter: bool = False

    def require(self, name: str, why: str) -> Any:
        """The value of an option.

        Raises:
            ConfigError: it is not set; ``why`` says what it is and where to find it.
        """
        value = getattr(self, name)
        if value is None:
            raise ConfigError(f"--{name.replace('_', '-')} is needed: {why}")
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        return value

    def refuse(self, peer: str, *names: str) -> None:
        """Refuse options that say nothing about this checkpoint.

        Raises:
            ConfigError: one of ``names`` is set.
        """
        for name in names:
            if getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} says nothing about this {peer} checkpoint")

    def agree(self, name: str, stored: int) -> None:
        """Refuse an option that contradicts a value that a file of the checkpoint states.

        Raises:
            ConfigError: it is set to another value.
        """
        value = getattr(self, name)
        if value is not None and value != stored:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, and the checkpoint's files say {stored}")


@dataclass(frozen=True)
class PeerCheckpoint:
    """A checkpoint on this machine.

    Attributes:
        checkpoint: its file or folder.
        base: folder of the base model, of which the configuration and the tokenizer are read; ``None``: not given.
        options: what the user says about it.
        dtype: of the written weights; ``None``: the widest of the checkpoint's.
    """

    checkpoint: Path
    base: Path | None
    options: ImportOptions
    dtype: torch.dtype | None = None

    def require_base(self, why: str = "the checkpoint has neither a configuration nor a tokenizer of its own") -> Path:
        """The base model's folder.

        Raises:
            ConfigError: it was not given; ``why`` says what it is for.
        """
        if self.base is None:
            raise ConfigError(f"--base is needed: {why}")
        return self.base


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in this project's terms.

    Attributes:
        config: of the base model, with the size of the enlarged vocabulary.
        base: weights of the base model under transformers' names; tied ones once.
        tokenizer: with the marker tokens.
        markers: ids of the marker tokens.
        loop: settings of the loop.
        text: settings of the texts.
        dtype: the widest of the checkpoint's weights.
        table_name: name of the embedding table among them.
        modules: weights of the loop's own modules.
        dropped: what of the checkpoint was dropped, and why.
        adapter: weights of an adapter that was not merged, named ``LAYER.lora_A`` and ``LAYER.lora_B``.
    """

    config: PreTrainedConfig
    base: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    markers: dict[str, int]
    loop: dict[str, Any]
    text: dict[str, Any]
    dtype: torch.dtype
    table_name: str
    modules: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)

    @property
    def table(self) -> Tensor:
        """The embedding table ``[V, d]``."""
        return self.base[self.table_name]


@dataclass(frozen=True)
class LoopStates:
    """The states of one request.

    Attributes:
        states: h_0 ... h_{R + 1} ``[R + 2, W, d]``: one iteration more than the R of its answer, since in a block that
            one computes what the closing pass does.
        prompt_state: the state ``[d]`` after the prompt.
    """

    states: Tensor
    prompt_state: Tensor


Recorded = Callable[[LoopedModel, LoopStates], dict[str, Tensor]]
"""From the states of a request to the tensors that a peer's own code records of it.

A key is appended to the number of the case.
"""


@dataclass(frozen=True)
class Peer:
    """A published project whose checkpoints can be imported.

    Attributes:
        name: on the command line.
        title: as the project calls itself.
        repository: where its code is.
        licence: of the code, as its repository states it.
        convert: converts a checkpoint.
        recorded: see :data:`Recorded`.
        reads_base_weights: whether the base's weights are needed, for checkpoints that have none of their own.
    """

    name: str
    title: str
    repository: str
    licence: str
    convert: Callable[[PeerCheckpoint], Conversion]
    recorded: Recorded
    reads_base_weights: bool = False
