"""The checkpoint folder: saving, loading, and one clear error for each way in which a folder can be wrong.

    slr_config.json          the loop, the base model (a folder inside this one, or a hub id), versions
    base/                    optional: the base model in transformers' own format
    loops/loop_01/ ...       PEFT adapters; loops/decode/ where there is one
    slr_modules.safetensors  timestep embedding, gates, projections
    tokenizer files

Only safetensors and JSON are read: nothing in a checkpoint can run code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slr_core._version import __version__
from slr_core.config import FORMAT_VERSION, SLRConfig
from slr_core.errors import CheckpointError, ConfigError
from slr_core.loop.lora import DECODE

if TYPE_CHECKING:
    from slr_core.model import LatentReasoner

R = TypeVar("R", bound="LatentReasoner")

CONFIG, MODULES, LOOPS, BASE = "slr_config.json", "slr_modules.safetensors", "loops", "base"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUNDLED = Path(__file__).parent / "checkpoints" / "prosqa"
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_READ_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


def save(reasoner: LatentReasoner, folder: str | Path) -> None:
    """Write ``reasoner`` as a checkpoint folder; existing files of the same names are replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = reasoner.config.replace(base=BASE, slr_version=__version__, format_version=FORMAT_VERSION)
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
    reasoner.base.save_pretrained(folder / BASE, state_dict=base_state(reasoner.base))
    reasoner.tokenizer.save_pretrained(folder)
    for stale in (folder / LOOPS).glob("*/"):
        if stale.name not in reasoner.adapter_configs and (stale / ADAPTER_CONFIG).is_file():
            shutil.rmtree(stale)
    for name, adapter in reasoner.adapter_configs.items():
        target = folder / LOOPS / name
        adapter.base_model_name_or_path = None  # a path of the machine that trained it helps nobody
        adapter.inference_mode = True
        adapter.save_pretrained(str(target))
        state = get_peft_model_state_dict(reasoner.base, adapter_name=name, save_embedding_layers=False)
        save_file({f"base_model.model.{key}": x.contiguous() for key, x in state.items()}, target / ADAPTER_WEIGHTS)
    save_file({key: x.contiguous() for key, x in modules_state(reasoner).items()}, folder / MODULES)


def base_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base model's own weights, under the names they had before adapters were attached."""
    return {key.replace(".base_layer.", "."): value for key, value in base.state_dict().items() if ".lora_" not in key}


def modules_state(reasoner: LatentReasoner) -> dict[str, Tensor]:
    """Weights of the loop's own modules."""
    return {key: value for key, value in reasoner.state_dict().items() if not key.startswith("base.")}


def load(
    cls: type[R], path_or_id: str | Path | None = None, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> R:
    """Load a checkpoint, in eval mode.

    Args:
        cls: the reasoner class.
        path_or_id: a folder, a hub id, or ``None`` for the bundled ``prosqa``.
        dtype: of the base model and its adapters; ``None``: as saved.
        device: where to put it.

    Raises:
        CheckpointError: anything is missing, damaged, of a newer format, or does not fit together.
    """
    folder = _folder(path_or_id)
    config = _config(folder)
    adapters = {name: _adapter_config(folder / LOOPS / name) for name in _adapter_names(folder, config)}
    base = _base(folder, config, dtype)
    tokenizer = _tokenizer(folder)
    embeddings = base.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if len(tokenizer) > embeddings:
        raise CheckpointError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the base model {embeddings}")
    try:
        reasoner = cls(base, tokenizer, config, adapters)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _load_loop(reasoner, folder)
    return reasoner.to(device).eval()


def load_weights(reasoner: LatentReasoner, folder: str | Path) -> None:
    """Load the weights of a checkpoint with its own base into a reasoner of the same shape.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors do not fit.
    """
    folder = Path(folder)
    path = folder / BASE / "model.safetensors"
    found, expected = _read(path), base_state(reasoner.base)
    # Tied weights are stored once.
    tied = set(getattr(reasoner.base, "all_tied_weights_keys", ()) or ())
    _check(path, found, {key: x for key, x in expected.items() if key in found or key not in tied})
    with torch.no_grad():
        for key, tensor in found.items():
            expected[key].copy_(tensor)
    _load_loop(reasoner, folder)
    reasoner.train(reasoner.training)  # forgets what was derived from the old weights


def _load_loop(reasoner: LatentReasoner, folder: Path) -> None:
    for name in reasoner.adapter_configs:
        _load_adapter(reasoner.base, folder / LOOPS / name, name)
    _load_modules(reasoner, folder / MODULES)


def _folder(path_or_id: str | Path | None) -> Path:
    if path_or_id is None:
        return BUNDLED
    folder = Path(path_or_id)
    try:
        if folder.is_dir():
            return folder
        return Path(snapshot_download(str(path_or_id), allow_patterns=_READ_FROM_HUB))
    except (HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(f"{path_or_id}: neither a folder nor a hub id that can be fetched ({error})") from error


def _config(folder: Path) -> SLRConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a latent-reasoning checkpoint, it has no {CONFIG}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else FORMAT_VERSION
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, this release reads up to {FORMAT_VERSION}: upgrade to load it"
        )
    try:
        return SLRConfig.from_dict(data)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _adapter_names(folder: Path, config: SLRConfig) -> list[str]:
    names = list(config.loop.adapters)
    return [*names, DECODE] if (folder / LOOPS / DECODE).is_dir() else names


def _adapter_config(folder: Path) -> LoraConfig:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: missing {ADAPTER_WEIGHTS} (only safetensors are read)")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises most kinds, each of them a fault of the file
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: not a readable PEFT config ({error})") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: peft_type must be LORA")
    return config


def _base(folder: Path, config: SLRConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        local = (folder / config.base).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: base is not a usable name ({error})") from error
    inside = local.is_relative_to(folder.resolve()) and local.is_dir()
    if config.base == BASE and not inside:
        raise CheckpointError(f"{folder}: the base model's folder {BASE}/ is missing, or a link out of the checkpoint")
    source = str(local) if inside else config.base
    # A relative name that exists beside the process would be taken for the hub id.
    if not inside and (
        Path(config.base).is_absolute() or ".." in Path(config.base).parts or Path(config.base).exists()
    ):
        raise CheckpointError(
            f"{folder / CONFIG}: base must be a folder inside the checkpoint or a hub id, got {config.base}"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises most kinds, each of them a fault of the folder
        raise CheckpointError(f"{folder}: the base model {source} cannot be loaded ({_short(error)})") from error
    model, info = loaded
    for fault in ("missing_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(f"{source}: the base model's weights have {fault}: {sorted(info[fault])[:3]}")
    assert isinstance(model, PreTrainedModel)
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"{source}: the base model's {key} holds values that are not finite")
    return model


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({_short(error)})") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _load_adapter(base: PreTrainedModel, folder: Path, name: str) -> None:
    prefix = "base_model.model."
    found = {key.removeprefix(prefix): x for key, x in _read(folder / ADAPTER_WEIGHTS).items()}
    expected = get_peft_model_state_dict(base, adapter_name=name, save_embedding_layers=False)
    _check(folder / ADAPTER_WEIGHTS, found, expected)
    set_peft_model_state_dict(base, found, adapter_name=name)


def _load_modules(reasoner: LatentReasoner, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: missing {path.name}")
    found = _read(path)
    _check(path, found, modules_state(reasoner))
    reasoner.load_state_dict(found, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _check(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, such as {missing[0]}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {len(unknown)} tensors are unknown, such as {unknown[0]}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(f"{path}: {key} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {key} has dtype {tensor.dtype}, expected one of {sorted(map(str, _DTYPES))}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def describe(reasoner: LatentReasoner) -> dict[str, Any]:
    """What ``slr info`` shows: sizes of the parts and the share that the loop adds to the base."""
    base = sum(p.numel() for key, p in reasoner.base.named_parameters() if ".lora_" not in key)
    adapters = sum(p.numel() for key, p in reasoner.base.named_parameters() if ".lora_" in key)
    modules = sum(x.numel() for x in modules_state(reasoner).values())
    return {
        "architecture": type(reasoner.base).__name__,
        "base_parameters": base,
        "adapter_parameters": adapters,
        "module_parameters": modules,
        "added_share": (adapters + modules) / base,
        "max_positions": reasoner.max_positions,
        "vocabulary": len(reasoner.tokenizer),
    }
