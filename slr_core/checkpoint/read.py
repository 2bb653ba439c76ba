"""The checkpoint folder: saving, loading, and one clear error for each way in which a folder can be wrong.

    slr_config.json          the loop, the base model (a folder inside this one, or a reference), versions
    base/                    the base model in transformers' own format, unless the config refers to one outside
    loops/loop_01/ ...       PEFT adapters; loops/decode/ where there is one
    slr_modules.safetensors  timestep embedding, gates, projections, latent vectors, halting head, latent decoder
    tokenizer files

Only safetensors and JSON are read: nothing in a checkpoint can run code. The files may change once they are loaded: all
weights are copies.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from slr_core.checkpoint.base_model import load_base_model, load_tokenizer
from slr_core.checkpoint.base_reference import base_source
from slr_core.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, CONFIG, LOOPS, MODULES
from slr_core.checkpoint.hub import checkpoint_folder
from slr_core.checkpoint.validate import (
    cast,
    check_files,
    check_tensors,
    checkpoint_error,
    read_base_weights,
    read_json,
    read_tensors,
    short,
)
from slr_core.checkpoint.write import base_state, modules_state
from slr_core.config import FORMAT_VERSION, SLRConfig
from slr_core.errors import ConfigError
from slr_core.loop.lora import DECODE, check_start, lora_layers, new_adapter_configs
from slr_core.model.looped import LoopedModel

R = TypeVar("R", bound="LoopedModel")

_LOADING = threading.Lock()
"""transformers replaces torch's initialization globally while it loads: if loads of two threads overlapped, it could
stay replaced, and later weights would hold whatever was in memory."""


def load_checkpoint(
    cls: type[R],
    path_or_id: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    idle_adapters: bool = True,
) -> R:
    """Load a checkpoint, in eval mode.

    Args:
        cls: the reasoner class.
        path_or_id: a folder, a hub id, or ``None`` for the bundled one: see :func:`local_path`.
        dtype: of the base model and its adapters; ``None``: as saved.
        device: where to put it.
        idle_adapters: attach adapters that add nothing, whose B is zero, as before training. Without them, the model
            computes the same in less memory, and cannot be trained or saved.

    Raises:
        CheckpointError: anything is missing, damaged, of a newer format, or does not fit together; the base that the
            config refers to is not installed or has other weights.
    """
    folder = checkpoint_folder(path_or_id)
    config = _config(folder)
    for read_by_libraries in (folder, folder / "additional_chat_templates"):
        if read_by_libraries.is_dir():
            check_files(read_by_libraries)
    adapters = _adapters(folder, config)
    idle = {} if idle_adapters else {name: n for name in adapters if (n := _idle_parameters(folder / LOOPS / name))}
    with _LOADING:
        base = load_base_model(folder, *base_source(folder, config), dtype)
        embeddings = base.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        tokenizer = load_tokenizer(folder, int(embeddings))
        try:
            # On the meta device: a config that asks for absurd sizes must not get them before the files were looked
            # at. There, initial values take time all the same.
            with torch.device("meta"), no_init_weights():
                reasoner = cls(base, tokenizer, config, {name: x for name, x in adapters.items() if name not in idle})
        except (ConfigError, RecursionError) as error:
            raise checkpoint_error(folder, error) from error
    _load_loop(reasoner, folder, assign=True)
    reasoner.adapters.names.update(idle)
    reasoner.idle_parameters = sum(idle.values())
    return reasoner.to(device).eval()


def load_weights(reasoner: LoopedModel, folder: str | Path) -> None:
    """Load the weights of a checkpoint with its own base into a reasoner of the same shape.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors do not fit.
    """
    folder = Path(folder)
    path = folder / BASE
    found, expected = read_base_weights(path), base_state(reasoner.base)
    # Tied weights are stored once.
    tied: dict[str, str] = getattr(reasoner.base, "all_tied_weights_keys", None) or {}
    check_tensors(path, found, {key: x for key, x in expected.items() if key in found or key not in tied})
    for key, source in tied.items():
        if key in found and source in found and not torch.equal(found[key], found[source]):
            raise checkpoint_error(
                path, f"{key} is tied to {source} in this model, and the files hold different values"
            )
    converted = {key: cast(path, key, tensor, expected[key].dtype) for key, tensor in found.items()}
    with torch.no_grad():
        for key, tensor in converted.items():
            expected[key].copy_(tensor)
    _load_loop(reasoner, folder)


def _load_loop(reasoner: LoopedModel, folder: Path, *, assign: bool = False) -> None:
    layers = lora_layers(reasoner.base)
    for name in reasoner.adapter_configs:
        _load_adapter(reasoner.base, layers, folder / LOOPS / name, assign)
    _load_modules(reasoner, folder / MODULES, assign)


def _config(folder: Path) -> SLRConfig:
    path = folder / CONFIG
    data = read_json(path)
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else FORMAT_VERSION
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise checkpoint_error(
            path, f"written in a newer format than this release reads ({FORMAT_VERSION}): upgrade to load it"
        )
    try:
        return SLRConfig.from_dict(data)
    except ConfigError as error:
        raise checkpoint_error(path, error) from error


def _adapters(folder: Path, config: SLRConfig) -> dict[str, LoraConfig]:
    ranks = {name: adapter.r for name, adapter in new_adapter_configs(config.loop).items()}
    names = list(ranks)
    if DECODE not in ranks and (folder / LOOPS / DECODE).is_dir():
        names.append(DECODE)
    adapters = {name: _adapter_config(folder / LOOPS / name) for name in names}
    for name, rank in ranks.items():
        if adapters[name].r != rank:
            raise checkpoint_error(
                folder / LOOPS / name, f"the adapter's rank is {adapters[name].r}, {CONFIG} says {rank}"
            )
    return adapters


def _adapter_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise checkpoint_error(folder, f"missing {ADAPTER_WEIGHTS} (only safetensors are read)")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        raise checkpoint_error(path, "not the config of a PEFT adapter with peft_type LORA")
    # A newer PEFT writes fields that this one does not know: harmless while they are off.
    known = LoraConfig.__dataclass_fields__
    if unknown := sorted(key for key, value in data.items() if key not in known and value):
        raise checkpoint_error(path, f"{unknown[0]} is not known to this release's PEFT")
    start = data.pop("init_lora_weights", True)
    try:
        check_start(start)
    except ConfigError as error:
        raise checkpoint_error(path, error) from error
    # The settings of a start, which PEFT would check against the packages that it needs, have served.
    if start == "eva":
        data.pop("eva_config", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what PEFT only warns of would change what the adapter does
            config = LoraConfig(**{key: value for key, value in data.items() if key in known})
    except Exception as error:  # peft raises most kinds, each of them a fault of the file
        raise checkpoint_error(path, f"not a readable PEFT config ({short(error)})") from error
    config.init_lora_weights = start
    return config


def _idle_parameters(folder: Path) -> int:
    """Number of parameters of an adapter that adds nothing; 0: it adds something."""
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    idle = not any(x.any() for key, x in tensors.items() if ".lora_A." not in key)
    return sum(x.numel() for x in tensors.values()) if idle else 0


def _load_adapter(base: PreTrainedModel, layers: dict[str, LoraLayer], folder: Path, assign: bool) -> None:
    prefix, name = "base_model.model.", folder.name
    found = {key.removeprefix(prefix): x for key, x in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    # Not PEFT's own functions: they look through the whole model several times for each adapter.
    owners = {
        f"{path}.{part}.{kind}": (getattr(layer, part)[name], kind)
        for path, layer in layers.items()
        if name in layer.lora_A
        for part in ("lora_A", "lora_B")
        for kind, _ in getattr(layer, part)[name].named_parameters()  # lora_bias: B has a bias
    }
    expected = {key: getattr(linear, kind) for key, (linear, kind) in owners.items()}
    check_tensors(folder / ADAPTER_WEIGHTS, found, expected)
    for key, tensor in _owned(folder / ADAPTER_WEIGHTS, found, base).items():
        if assign:
            linear, kind = owners[key]
            setattr(linear, kind, torch.nn.Parameter(tensor, requires_grad=expected[key].requires_grad))
        else:
            expected[key].data.copy_(tensor)


def _load_modules(reasoner: LoopedModel, path: Path, assign: bool) -> None:
    if not path.exists():
        raise checkpoint_error(path.parent, f"missing {path.name}")
    found = read_tensors(path)
    check_tensors(path, found, modules_state(reasoner))
    reasoner.load_state_dict(_owned(path, found, reasoner.base), strict=False, assign=assign)


def _owned(path: Path, tensors: dict[str, Tensor], base: PreTrainedModel) -> dict[str, Tensor]:
    # Copies: the originals are views of a file that may be written again.
    return {key: cast(path, key, x, base.dtype) for key, x in tensors.items()}
