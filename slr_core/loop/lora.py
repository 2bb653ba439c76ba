"""The loop adapters ``L_t``: ordinary PEFT LoRA adapters, one active at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from slr_core.config import LoopConfig
from slr_core.errors import ConfigError, RequestError

DECODE = "decode"
"""Name of the optional adapter that writes the answer after a loop."""


def trained_index(t: int, trained: int, past_end: str) -> int:
    """The trained iteration (1-based) whose weights serve iteration ``t``.

    Raises:
        RequestError: ``t`` lies past the last trained iteration and the policy is ``error``.
    """
    if t <= trained:
        return t
    if past_end == "error":
        raise RequestError(f"iteration {t} lies past the last trained iteration, {trained}", param="max_iterations")
    return (t - 1) % trained + 1 if past_end == "cycle" else trained


class LoopAdapters:
    """Which adapter of a PEFT model acts during a forward pass.

    PEFT's own ``set_adapter`` also freezes all adapters but the active one, which would undo training
    several of them at once; here the active name alone is switched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.names = {name for layer in self.layers for name in layer.lora_A}
        self._activate(None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let adapter ``name`` act inside the block; ``None`` is the plain base model."""
        self._activate(name)
        try:
            yield
        finally:
            self._activate(None)

    def _activate(self, name: str | None) -> None:
        for layer in self.layers:
            layer._active_adapter = [] if name is None else [name]


def fresh(loop: LoopConfig) -> dict[str, LoraConfig]:
    """PEFT configs of untrained loop adapters, by adapter name."""
    config = loop.lora
    return {
        name: LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r: any number will do
            target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
            task_type="CAUSAL_LM",
        )
        for name in loop.adapters
    }


def attach(base: PreTrainedModel, configs: Mapping[str, LoraConfig]) -> None:
    """Add adapters to ``base`` in place (``B = 0``: they change nothing until trained or loaded).

    Raises:
        ConfigError: a target module does not exist in the base model, or the adapter is of a kind that
            cannot serve in a loop.
    """
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    for name, config in configs.items():
        _refuse(name, config)
        try:
            with warnings.catch_warnings():
                # Several adapters on one model are the point here, and PEFT warns of the second.
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                inject_adapter_in_model(config, base, adapter_name=name)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"adapter {name}: {error}") from error
    # PEFT freezes the base and all adapters but one: here nothing is frozen that was not before.
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.replace(".base_layer.", ".") in trainable)


def _refuse(name: str, config: LoraConfig) -> None:
    targets = config.target_modules or ()
    listed = {targets} if isinstance(targets, str) else set(targets)
    faults = {
        "use_dora": bool(config.use_dora),
        "modules_to_save": bool(config.modules_to_save),
        "trainable_token_indices": bool(config.trainable_token_indices),
        "target_parameters": bool(config.target_parameters),
        "lora_bias": bool(config.lora_bias),
        "bias": config.bias != "none",
        "target_modules (embedding or LM head)": any(
            target.split(".")[-1] in ("embed_tokens", "wte", "lm_head") for target in listed
        ),
    }
    for fault, present in faults.items():
        if present:
            raise ConfigError(f"adapter {name}: {fault} is not supported in a loop adapter; use plain LoRA")
