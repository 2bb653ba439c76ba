"""The checkpoint folder: saving, loading, and one clear error for each way in which a folder can be wrong.

    slr_config.json          the loop, the base model (a folder inside this one, or a hub id), versions
    base/                    optional: the base model in transformers' own format
    loops/loop_01/ ...       PEFT adapters; loops/decode/ where there is one
    slr_modules.safetensors  timestep embedding, gates, projections, latent vectors, halting head, latent decoder
    tokenizer files

Only safetensors and JSON are read: nothing in a checkpoint can run code.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slr_core._version import __version__
from slr_core.config import FORMAT_VERSION, SLRConfig
from slr_core.errors import CheckpointError, ConfigError
from slr_core.loop.lora import DECODE, fresh
from slr_core.model import LatentReasoner

R = TypeVar("R", bound="LatentReasoner")

CONFIG, MODULES, LOOPS, BASE = "slr_config.json", "slr_modules.safetensors", "loops", "base"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHIPPED = Path(__file__).parent / "checkpoints"
BUNDLED = SHIPPED / "prosqa"
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST = 1024  # layers, experts, labels of a base model: made one by one, before any weight is looked at
_MOST_BUFFERS = 2**26  # values that a base model computes for itself, such as the angles of its positions
_PACKED = 16  # parameters that one stored number may hold in a quantized base model
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
        if isinstance(adapter.target_modules, set):  # PEFT would write them in another order in every process
            adapter.target_modules = sorted(adapter.target_modules)
        adapter.save_pretrained(str(target))
        state = get_peft_model_state_dict(reasoner.base, adapter_name=name, save_embedding_layers=False)
        save_file({f"base_model.model.{key}": x.contiguous() for key, x in state.items()}, target / ADAPTER_WEIGHTS)
    save_file({key: x.contiguous() for key, x in modules_state(reasoner).items()}, folder / MODULES)
    for weights in folder.rglob("*.safetensors"):
        # They are written for their owner alone; a server that runs as another user must read them too.
        weights.chmod((folder / CONFIG).stat().st_mode)


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
        path_or_id: a folder, a hub id, or ``None`` for the bundled one: see :func:`local_path`.
        dtype: of the base model and its adapters; ``None``: as saved.
        device: where to put it.

    Raises:
        CheckpointError: anything is missing, damaged, of a newer format, or does not fit together.
    """
    folder = _folder(path_or_id)
    config = _config(folder)
    adapters = _adapters(folder, config)
    base = _base(folder, config, dtype)
    embeddings = base.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    tokenizer = _tokenizer(folder, int(embeddings))
    try:
        # On the meta device: a config that asks for absurd sizes must not get them before the files were looked at.
        with torch.device("meta"):
            reasoner = cls(base, tokenizer, config, adapters)
    except (ConfigError, RecursionError) as error:
        raise _fault(folder, error) from error
    _load_loop(reasoner, folder, assign=True)
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


def _load_loop(reasoner: LatentReasoner, folder: Path, *, assign: bool = False) -> None:
    for name in reasoner.adapter_configs:
        _load_adapter(reasoner.base, folder / LOOPS / name, name, assign)
    _load_modules(reasoner, folder / MODULES, assign)


def local_path(path_or_id: str | Path | None) -> Path:
    """Where a checkpoint is, if here: ``None`` is ``prosqa``; those that ship have names, unless a folder has them."""
    path = BUNDLED if path_or_id is None else Path(path_or_id)
    shipped = {folder.name: folder for folder in SHIPPED.iterdir()}.get(str(path))
    return path if shipped is None or path.is_dir() else shipped


def _folder(path_or_id: str | Path | None) -> Path:
    folder = local_path(path_or_id)
    try:
        return folder if folder.is_dir() else Path(snapshot_download(str(path_or_id), allow_patterns=_READ_FROM_HUB))
    except (HFValidationError, OSError, ValueError) as error:
        raise _fault(str(path_or_id), f"neither a folder nor a hub id that can be fetched ({_line(error)})") from error


def _config(folder: Path) -> SLRConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise _fault(folder, f"not a latent-reasoning checkpoint, it has no {CONFIG}")
    data = _json(path)
    version = data.get("format_version", FORMAT_VERSION) if isinstance(data, dict) else FORMAT_VERSION
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise _fault(path, f"written in a newer format than this release reads ({FORMAT_VERSION}): upgrade to load it")
    try:
        return SLRConfig.from_dict(data)
    except ConfigError as error:
        raise _fault(path, error) from error


def _adapters(folder: Path, config: SLRConfig) -> dict[str, LoraConfig]:
    ranks = {name: adapter.r for name, adapter in fresh(config.loop).items()}
    names = list(ranks)
    if DECODE not in ranks and (folder / LOOPS / DECODE).is_dir():
        names.append(DECODE)
    adapters = {name: _adapter_config(folder / LOOPS / name) for name in names}
    for name, rank in ranks.items():
        if adapters[name].r != rank:
            raise _fault(folder / LOOPS / name, f"the adapter's rank is {adapters[name].r}, {CONFIG} says {rank}")
    return adapters


def _adapter_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _fault(folder, f"missing {ADAPTER_WEIGHTS} (only safetensors are read)")
    data = _json(path)
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        raise _fault(path, "not the config of a PEFT adapter with peft_type LORA")
    # A newer PEFT writes fields that this one does not know: harmless while they are off.
    known = LoraConfig.__dataclass_fields__
    if unknown := sorted(key for key, value in data.items() if key not in known and value):
        raise _fault(path, f"{unknown[0]} is not known to this release's PEFT")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what PEFT only warns of would change what the adapter does
            return LoraConfig(**{key: value for key, value in data.items() if key in known})
    except Exception as error:  # peft raises most kinds, each of them a fault of the file
        raise _fault(path, f"not a readable PEFT config ({_short(error)})") from error


def _base_source(folder: Path, config: SLRConfig) -> tuple[str, bool]:
    """Where the base model is, and whether that is a folder inside the checkpoint."""
    try:
        local = (folder / config.base).resolve()
        inside = folder.resolve() in local.parents and local.is_dir()
        # A relative name that exists beside the process would be taken for the hub id.
        named = Path(config.base)
        elsewhere = named.is_absolute() or ".." in named.parts or named.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise _fault(folder / CONFIG, f"base is not a usable name ({_line(error)})") from error
    if config.base == BASE and not inside:
        raise _fault(folder, f"the base model's folder {BASE}/ is missing, or a link out of the checkpoint")
    if not inside and elsewhere:
        raise _fault(folder / CONFIG, f"base must be a folder inside the checkpoint or a hub id, got {config.base}")
    return str(local) if inside else config.base, inside


def _base(folder: Path, config: SLRConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    source, inside = _base_source(folder, config)
    if inside:
        _check_base(Path(source))
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
        raise _fault(folder, f"the base model {source} cannot be loaded ({_short(error)})") from error
    model, info = loaded
    # What others publish may hold more than a causal language model.
    for fault in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if inside else [])):
        if info[fault]:
            raise _fault(source, f"the base model's weights have {fault}: {sorted(info[fault])[:3]}")
    assert isinstance(model, PreTrainedModel)
    for key, parameter in model.named_parameters():
        if parameter.dtype not in _DTYPES and not _quantized(model.config):
            raise _fault(source, f"the base model's {key} has dtype {parameter.dtype}, expected one of {_FLOATS}")
        if not parameter.isfinite().all():
            raise _fault(source, f"the base model's {key} holds values that are not finite")
    positions = getattr(model.config, "max_position_embeddings", 1)
    if not isinstance(positions, int) or positions < 1:
        raise _fault(source, f"max_position_embeddings must be a positive integer, got {positions}")
    try:
        # Not every config that makes a model makes one that runs.
        with torch.inference_mode():
            state = model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long)).last_hidden_state
    except Exception as error:  # as above
        raise _fault(source, f"the base model does not run ({_short(error)})") from error
    if not state.isfinite().all():
        raise _fault(source, "the base model's states are not finite")
    return model


def _check_base(path: Path) -> None:
    """Refuse a base model that claims to be larger than its files before anything of that size is allocated."""
    for key, value in _integers(_json(path / "config.json")):
        if re.search("(layers?|blocks|experts|labels)$", key) and value > _MOST:
            raise _fault(path / "config.json", f"{key} must be at most {_MOST}")
    if (path / ADAPTER_CONFIG).exists():
        raise _fault(path, f"a base model must not have an adapter of its own ({ADAPTER_CONFIG})")
    stored = {key: x for file in sorted(path.glob("*.safetensors")) for key, x in _header(file).items()}
    if not stored:
        raise _fault(path, "no weights of the base model (only safetensors are read)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False, attn_implementation="sdpa"
            )
    except Exception as error:  # as above
        raise _fault(path, f"the base model cannot be built from its config ({_short(error)})") from error
    claimed, held = sum(x.numel() for x in shell.parameters()), sum(prod(x.shape) for x in stored.values())
    # Names and shapes are left to transformers, which may convert them; a stored number may pack several.
    if claimed > (held * _PACKED if _quantized(config) else held):
        raise _fault(path / "config.json", f"it describes {claimed} parameters, and the weights hold {held}")
    if sum(x.numel() for x in shell.buffers()) > _MOST_BUFFERS:
        raise _fault(path / "config.json", f"it describes more than {_MOST_BUFFERS} values besides the parameters")
    for key in () if _quantized(config) else stored.keys() & shell.state_dict().keys():
        if stored[key].dtype not in _FLOATS:
            raise _fault(path, f"the base model's {key} is stored as {stored[key].dtype}, expected one of {_FLOATS}")


def _quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _integers(data: Any) -> Iterator[tuple[str, int]]:
    """Every integer in parsed JSON that has a name of its own."""
    left = [data]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from ((key, value) for key, value in item.items() if isinstance(value, int))
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _tokenizer(folder: Path, embeddings: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Once on some text: what it adds by itself need not be in its vocabulary.
        ids = [*tokenizer.get_vocab().values(), *tokenizer("a").input_ids]
    except Exception as error:  # as above
        raise _fault(folder, f"the tokenizer cannot be loaded ({_short(error)})") from error
    if max(ids, default=0) >= embeddings:
        raise _fault(folder, f"the tokenizer has tokens up to {max(ids)}, the base model {embeddings} embeddings")
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _load_adapter(base: PreTrainedModel, folder: Path, name: str, assign: bool) -> None:
    prefix = "base_model.model."
    found = {key.removeprefix(prefix): x for key, x in _read(folder / ADAPTER_WEIGHTS).items()}
    expected = get_peft_model_state_dict(base, adapter_name=name, save_embedding_layers=False)
    _check(folder / ADAPTER_WEIGHTS, found, expected)
    set_peft_model_state_dict(base, _owned(found, base), adapter_name=name, low_cpu_mem_usage=assign)


def _load_modules(reasoner: LatentReasoner, path: Path, assign: bool) -> None:
    if not path.is_file():
        raise _fault(path.parent, f"missing {path.name}")
    found = _read(path)
    _check(path, found, modules_state(reasoner))
    reasoner.load_state_dict(_owned(found, reasoner.base), strict=False, assign=assign)


def _owned(tensors: dict[str, Tensor], base: PreTrainedModel) -> dict[str, Tensor]:
    # Copies: the originals are views of a file that may be written again.
    return {key: x.to(base.dtype, copy=True) for key, x in tensors.items()}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except (OSError, ValueError, RecursionError) as error:
        raise _fault(path, f"not readable as JSON ({_line(error)})") from error


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises most kinds, each of them a fault of the file
        raise _fault(path, f"not a readable safetensors file ({_short(error)})") from error


class _Stored(NamedTuple):
    shape: list[int]
    dtype: str


def _header(path: Path) -> dict[str, _Stored]:
    """What a safetensors file holds, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: _Stored(list(x.get_shape()), str(x.get_dtype())) for key, x in slices.items()}
    except Exception as error:  # as above
        raise _fault(path, f"not a readable safetensors file ({_short(error)})") from error


def _check(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, keys in {"missing": expected.keys() - found.keys(), "unknown": found.keys() - expected.keys()}.items():
        if keys:
            raise _fault(path, f"{len(keys)} tensors are {what}, such as {min(keys)}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise _fault(path, f"{key} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
        if tensor.dtype not in _DTYPES:
            raise _fault(path, f"{key} has dtype {tensor.dtype}, expected one of {sorted(map(str, _DTYPES))}")
        if not tensor.isfinite().all():
            raise _fault(path, f"{key} holds values that are not finite")


def _fault(where: str | Path, what: object) -> CheckpointError:
    return CheckpointError(f"{where}: {_line(what)}")


def _short(error: Exception) -> str:
    return _line(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0])


def _line(text: object) -> str:
    """One printable line of bounded length: names and values from a damaged file can be anything."""
    whole = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:10_000]).split())
    return whole if len(whole) <= 400 else whole[:399] + "…"
