"""Writing a checkpoint folder."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slr_core._version import __version__
from slr_core.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, CONFIG, LOOPS, MODULES
from slr_core.checkpoint.pretrained import PACKAGED
from slr_core.checkpoint.validate import WEIGHTS_INDEX
from slr_core.config import FORMAT_VERSION, SLRConfig
from slr_core.model.looped import LoopedModel


def save_checkpoint(reasoner: LoopedModel, folder: str | Path) -> None:
    """Write ``reasoner`` as a checkpoint folder; existing files of the same names are replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Weights in one file and weights in shards have other names: those of an earlier save would be read instead.
    for stale in [*(folder / BASE).glob("*.safetensors"), folder / BASE / WEIGHTS_INDEX]:
        stale.unlink(missing_ok=True)
    reasoner.base.save_pretrained(folder / BASE, state_dict=base_state(reasoner.base))
    save_without_base(reasoner, folder, reasoner.config.replace(base=BASE, base_revision=None, base_sha256=None))


def save_without_base(reasoner: LoopedModel, folder: Path, config: SLRConfig, dtype: torch.dtype | None = None) -> None:
    """Write all of a checkpoint folder but the base model.

    Args:
        reasoner: whose loop and tokenizer are written.
        folder: exists.
        config: the config to write; the versions are filled in.
        dtype: of the adapters and of the loop's modules; ``None``: their own.
    """
    config = config.replace(slr_version=__version__, format_version=FORMAT_VERSION)
    (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
    reasoner.tokenizer.save_pretrained(folder)
    for stale in (folder / LOOPS).glob("*/"):
        if stale.name not in reasoner.adapter_configs and (stale / ADAPTER_CONFIG).is_file():
            shutil.rmtree(stale)
    hub_base = config.base_sha256 is not None and config.base not in PACKAGED
    for name, adapter in reasoner.adapter_configs.items():
        target = folder / LOOPS / name
        # A path of the machine that trained it helps nobody; PEFT downloads a hub id.
        adapter.base_model_name_or_path = config.base if hub_base else None
        adapter.revision = config.base_revision if hub_base else None
        adapter.inference_mode = True
        if isinstance(adapter.target_modules, set):  # PEFT would write them in another order in every process
            adapter.target_modules = sorted(adapter.target_modules)
        adapter.save_pretrained(str(target))
        with warnings.catch_warnings():
            # PEFT takes a bias of B (lora_bias) for a part of a matrix.
            warnings.filterwarnings("ignore", "Adapter .* LoRA tensor.s. have invalid shape", UserWarning)
            state = get_peft_model_state_dict(reasoner.base, adapter_name=name, save_embedding_layers=False)
        _save({f"base_model.model.{key}": x for key, x in state.items()}, target / ADAPTER_WEIGHTS, dtype)
    _save(modules_state(reasoner), folder / MODULES, dtype)
    for weights in folder.rglob("*.safetensors"):
        # They are written for their owner alone; a server that runs as another user must read them too.
        weights.chmod((folder / CONFIG).stat().st_mode)


def _save(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    save_file({key: x.to(dtype or x.dtype).contiguous() for key, x in tensors.items()}, path)


def base_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base model's own weights, under the names they had before adapters were attached."""
    return {key.replace(".base_layer.", "."): value for key, value in base.state_dict().items() if ".lora_" not in key}


def modules_state(reasoner: LoopedModel) -> dict[str, Tensor]:
    """Weights of the loop's own modules."""
    return {key: value for key, value in reasoner.state_dict().items() if not key.startswith("base.")}
