"""Write a conversion as a checkpoint folder, with its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from slr_core._version import __version__
from slr_core.checkpoint.folder import ADAPTER_WEIGHTS, BASE, CONFIG, LOOPS, MODULES
from slr_core.checkpoint.importers.peer import Conversion, Peer
from slr_core.config import SLRConfig
from slr_core.loop.lora import new_adapter_configs

CARD = """---
library_name: slr
tags: [latent-reasoning, {peer}]
{licence_key}---

# {name}

A checkpoint of {title} ({repository}), converted by `slr import` {version}:

    {command}

| | |
|---|---|
| checkpoint | `{checkpoint}` |
| base | {base} |
| licence of the checkpoint | {licence} |
| licence of {title}'s code, none of which is here | {code_licence} |
| loop | {loop} |
| markers | {markers} |

Dropped: {dropped}

{check}

`slr info --model {name}` describes the folder; docs/importing.md says what is exact and what differs on purpose.
"""


def write_folder(conversion: Conversion, folder: Path, dtype: torch.dtype | None) -> None:
    """Write all files but the model card.

    Args:
        conversion: what to write.
        folder: exists and is empty.
        dtype: of the written weights; ``None``: the widest of the checkpoint's.
    """
    config, tokenizer = conversion.config, conversion.tokenizer
    chosen = dtype or conversion.dtype
    config.dtype, config._name_or_path = chosen, ""
    (folder / BASE).mkdir()
    config.architectures = None
    config.save_pretrained(folder / BASE)
    _save(conversion.base, folder / BASE / "model.safetensors", chosen)
    # Only the tokenizer's end token ends an answer, whatever else the base's generation config listed.
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id)  # type: ignore[no-untyped-call]
    generation.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder)
    _save(conversion.modules, folder / MODULES, chosen)
    settings = SLRConfig.from_dict(
        {"base": BASE, "slr_version": __version__, "loop": conversion.loop, "text": conversion.text}
    )
    (folder / CONFIG).write_text(settings.to_json(), encoding="utf-8")
    if conversion.adapter:
        _write_adapter(conversion, settings, folder / LOOPS / settings.loop.adapters[0], chosen)


def _save(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    # Cloned: tensors of one pickle may share a storage, which safetensors refuses.
    save_file({name: x.to(dtype, copy=True).contiguous() for name, x in tensors.items()}, path, {"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_adapter(conversion: Conversion, settings: SLRConfig, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    (adapter,) = new_adapter_configs(settings.loop).values()
    adapter.target_modules = list(settings.loop.lora.target_modules or ())
    adapter.fan_in_fan_out = conversion.config.model_type == "gpt2"
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))
    named = {f"base_model.model.{name}.weight": tensor for name, tensor in conversion.adapter.items()}
    _save(named, folder / ADAPTER_WEIGHTS, dtype)


def write_card(
    conversion: Conversion,
    folder: Path,
    *,
    peer: Peer,
    name: str,
    checkpoint: str,
    base: str | None,
    licence: str | None,
    command: str,
    check: str,
) -> None:
    """Write ``README.md``: where the weights are from, their licence, the command, and what was dropped."""
    loop = conversion.loop
    convergence = loop["convergence"]
    early = f"fewer where `{convergence['criterion']}` falls below {convergence.get('threshold', 0):g}"
    length = early if convergence.get("threshold") else "all of them in every answer"
    size = f", {loop['block_size']} latent positions" if "block_size" in loop else ""
    card = CARD.format(
        peer=peer.name,
        licence_key=f"license: {licence}\n" if licence else "",
        name=name,
        title=peer.title,
        repository=peer.repository,
        version=__version__,
        command=command,
        checkpoint=checkpoint,
        base=f"`{base}`" if base else "in the checkpoint",
        licence=licence or "not stated in its files",
        code_licence=peer.licence,
        loop=f"`{loop['workspace']}`, {loop['max_iterations']} iterations, {length}{size}",
        markers=", ".join(f"`{token}` {i}" for token, i in conversion.markers.items()) or "none",
        dropped="; ".join(f"{what}: {why}" for what, why in conversion.dropped.items()) or "nothing",
        check=check,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
