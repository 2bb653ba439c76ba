"""The loop adapters ``L_t``: ordinary PEFT LoRA adapters, one active at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slr_core.config import LoopConfig
from slr_core.errors import ConfigError, RequestError
from slr_core.loop.targets import resolve_targets

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

    Args:
        model: the model.
        default: the adapter that acts outside :meth:`use`; ``None``: none, the plain base model.
    """

    def __init__(self, model: nn.Module, default: str | None = None) -> None:
        self.default = default
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.names = {name for layer in self.layers for name in layer.lora_A}
        self._activate(None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let adapter ``name`` act inside the block; ``None`` is the default."""
        self._activate(name)
        try:
            yield
        finally:
            self._activate(None)

    def _activate(self, name: str | None) -> None:
        name = self.default if name is None else name
        for layer in self.layers:
            layer._active_adapter = [] if name is None else [name]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model with PEFT's LoRA, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def new_adapter_configs(loop: LoopConfig) -> dict[str, LoraConfig]:
    """PEFT configs of untrained adapters, by adapter name: the loop's, and ``decode`` where there is one."""
    config = loop.lora
    ranks = list(config.rank) if isinstance(config.rank, tuple) else [config.rank] * len(loop.adapters)
    named = dict(zip(loop.adapters, ranks, strict=True))
    if config.decode_rank is not None:
        named[DECODE] = config.decode_rank
    return {
        name: LoraConfig(
            r=rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r: any number will do
            target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
            task_type="CAUSAL_LM",
        )
        for name, rank in named.items()
    }


def attach(base: PreTrainedModel, configs: Mapping[str, LoraConfig]) -> None:
    """Add adapters to ``base`` in place (``B = 0``: they change nothing until trained or loaded).

    Raises:
        ConfigError: a name or pattern in a config matches no module of the base model, or the adapter is of a kind
            that cannot serve in a loop.
    """
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    first: LoraConfig | None = None
    targets: list[str] | str | None = None
    layers: list[LoraLayer] = []
    for name, config in configs.items():
        _refuse(name, config)
        config.fan_in_fan_out = config.fan_in_fan_out or transposed
        try:
            resolved = resolve_targets(base, config)
        except ConfigError as error:
            raise ConfigError(f"adapter {name}: {error}") from error
        if resolved.init_lora_weights is not True:  # how an adapter started does not matter once it is trained
            resolved = copy.copy(resolved)
            resolved.init_lora_weights = True
        try:
            if first is not None and _differs_in_size_alone(resolved, first):
                resolved.target_modules = targets
                _add_to_layers(base, resolved, name, layers)
                continue
            asked = copy.copy(resolved)
            with warnings.catch_warnings():
                # Several adapters on one model are the point here, and PEFT warns of the second.
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                _ignore_missing_bias()
                inject_adapter_in_model(resolved, base, adapter_name=name)
        except Exception as error:  # PEFT raises most kinds, each of them a fault of the config
            raise ConfigError(f"adapter {name}: {error}") from error
        head, found = base.get_output_embeddings(), list(lora_layers(base).values())  # type: ignore[no-untyped-call]
        if isinstance(head, LoraLayer) or any(isinstance(layer.get_base_layer(), nn.Embedding) for layer in found):
            raise ConfigError(
                f"adapter {name}: the embeddings or the LM head in target_modules are not supported in a loop adapter"
            )
        if first is None:
            # PEFT has put the names of the layers in place of `all-linear`.
            first, targets, layers = asked, resolved.target_modules, found
    # PEFT freezes the base and all adapters but one: here nothing is frozen that was not before.
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.replace(".base_layer.", ".") in trainable)


def _differs_in_size_alone(config: LoraConfig, first: LoraConfig) -> bool:
    """Whether an adapter has the layers of the first one, with at most another rank and scale."""
    same = copy.copy(config)
    same.r, same.lora_alpha = first.r, first.lora_alpha
    return _plain_values(same) == _plain_values(first)


def _plain_values(config: LoraConfig) -> dict[str, object]:
    values = {field: getattr(config, field) for field in sorted(_PLAIN - {"base_model_name_or_path", "peft_version"})}
    if not isinstance(config.target_modules, str):
        values["target_modules"] = sorted(config.target_modules or ())
    return values


def _add_to_layers(base: PreTrainedModel, config: LoraConfig, name: str, layers: list[LoraLayer]) -> None:
    """Add an adapter as PEFT does, but without its search for the layers, which takes seconds for many adapters."""
    with warnings.catch_warnings():
        _ignore_missing_bias()
        for layer in layers:
            layer.update_layer(name, config.r, lora_alpha=config.lora_alpha, config=config)
    configs: dict[str, Any] = base.peft_config
    configs[name] = config


def _ignore_missing_bias() -> None:
    # Of an adapter's bias on a layer without one, PEFT warns that it cannot be merged; it never is here.
    warnings.filterwarnings("ignore", "`lora_bias=True` was passed but", UserWarning)


PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


def check_start(value: object) -> None:
    """Check that ``init_lora_weights`` of a PEFT config left the base model's weights as they were.

    Raises:
        ConfigError: it did not, or is no known value.
    """
    if value not in PLAIN_STARTS:
        raise ConfigError(
            f"init_lora_weights {value!r} is not supported in a loop adapter: it changes the base model's weights; "
            "convert the adapter to plain LoRA (in PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


_PLAIN = {
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
    # not about what the adapter computes:
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


def _refuse(name: str, config: LoraConfig) -> None:
    # Whatever else PEFT offers changes what an adapter computes (DoRA), trains more than the adapter
    # (modules_to_save), or rewrites the base weights that all iterations share (starts such as PiSSA).
    try:
        check_start(config.init_lora_weights)
    except ConfigError as error:
        raise ConfigError(f"adapter {name}: {error}") from error
    defaults = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for field, value in config.to_dict().items():  # type: ignore[no-untyped-call]
        if field not in _PLAIN and value != defaults.get(field):
            raise ConfigError(f"adapter {name}: {field} is not supported in a loop adapter; use plain LoRA")
