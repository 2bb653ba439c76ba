"""``slr export --to adapters``: a checkpoint folder that refers to its base model in place of a copy of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from slr_core._version import __version__
from slr_core.checkpoint.base_model import load_base_model
from slr_core.checkpoint.base_reference import BaseReference, find_reference
from slr_core.checkpoint.hub import checkpoint_folder
from slr_core.checkpoint.info import describe_model
from slr_core.checkpoint.pretrained import PACKAGED
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.validate import is_finite, read_files
from slr_core.checkpoint.write import base_state, modules_state, save_without_base
from slr_core.checkpoint.written_whole import check_new, check_outside, written_whole
from slr_core.errors import ConfigError
from slr_core.model.base_support import computation_settings, end_tokens
from slr_core.model.looped import LoopedModel

DTYPE = torch.float16
"""Of the written weights. Trained adapters are far from its limits, and it rounds them 8 times finer than bfloat16."""
COPIED = ("training.json", "examples.json", "*.jsonl")
"""Files beside the weights that belong to a published checkpoint."""

CARD = """---
library_name: slr
tags: [latent-reasoning, peft]
---

# {name}

A latent reasoner: {sizes}.
"""
BASE_SECTION = """
## Base model

{where}. SHA-256 of its weights: `{sha256}`; it is compared when the checkpoint is loaded.
This folder has adapters, modules and tokenizer alone, in {dtype}, written by `slr export --to adapters` {version}.
"""


def publish_checkpoint(
    model: str | None, out: str | Path, base: str | None = None, base_revision: str | None = None
) -> BaseReference:
    """Write adapters, modules, tokenizer, config and card of a checkpoint; its base becomes a reference.

    Args:
        model: a folder, a hub id or a bundled name.
        out: the folder to write; it must be new or empty.
        base: the base model that it was trained from, a key of :data:`PACKAGED` or a hub id; ``None``: the one that
            its config refers to.
        base_revision: branch, tag or commit of the hub id.

    Returns:
        The reference that was written.

    Raises:
        ConfigError: no base is named, or the checkpoint's base is another one: trained, or in another number format;
            a weight is too large for half precision; or the folder cannot be written.
        CheckpointError: the checkpoint or the base cannot be loaded.
    """
    out = Path(out)
    check_new(out)
    source = checkpoint_folder(model)
    check_outside(out, source)
    reasoner = load_checkpoint(LoopedModel, source)
    if base is None:
        if reasoner.config.base_sha256 is None:
            raise ConfigError(f"--base: name the base model of this checkpoint, a hub id or {', '.join(PACKAGED)}")
        base, base_revision = reasoner.config.base, reasoner.config.base_revision
    elif base in PACKAGED and base_revision is not None:
        raise ConfigError(
            "--base-revision needs a hub id as --base; the revision of a package is the installed version"
        )
    reference = find_reference(base, base_revision)
    _check_base(reasoner, reference)
    _check_range(reasoner)
    config = reasoner.config.replace(
        base=reference.name, base_revision=reference.revision, base_sha256=reference.sha256
    )
    copied = read_files(source, *COPIED)
    with written_whole(out) as written:
        save_without_base(reasoner, written, config, DTYPE)
        for name, content in copied.items():
            (written / name).write_bytes(content)
        (written / "README.md").write_text(_card(source, out.name, reasoner, reference), encoding="utf-8")
    return reference


def _check_base(reasoner: LoopedModel, reference: BaseReference) -> None:
    """Check that a base model computes what the referenced one does: the same weights, settings and end tokens."""
    original = load_base_model(reference.folder, str(reference.folder), False, None)
    ours, theirs = base_state(reasoner.base), original.state_dict()
    if ours.keys() != theirs.keys():
        raise ConfigError(
            f"the checkpoint's base is not {reference.name}: they differ in {min(ours.keys() ^ theirs.keys())}"
        )
    for key, tensor in theirs.items():
        if ours[key].dtype != tensor.dtype or not torch.equal(ours[key], tensor):
            raise ConfigError(
                f"the checkpoint's base is not {reference.name}: {key} differs; it has been trained, or is in another "
                "number format (train with `train: adapters` and the dtype of the base)"
            )
    for key, value in computation_settings(original.config).items():
        if (own := computation_settings(reasoner.base.config).get(key)) != value:
            raise ConfigError(
                f"the checkpoint's base is not {reference.name}: {key} of its config is {own}, not {value}"
            )
    if end_tokens(reasoner.base, reasoner.tokenizer) != end_tokens(original, reasoner.tokenizer):
        raise ConfigError(f"the checkpoint's base is not {reference.name}: its end tokens differ")


def _check_range(reasoner: LoopedModel) -> None:
    adapters = {key: x for key, x in reasoner.base.named_parameters() if ".lora_" in key}
    for key, tensor in {**adapters, **modules_state(reasoner)}.items():
        if not is_finite(tensor.to(DTYPE)):
            raise ConfigError(
                f"{key} holds values that are too large for half precision, up to {tensor.abs().max():.3g}"
            )


def _card(source: Path, name: str, reasoner: LoopedModel, reference: BaseReference) -> str:
    """The card of the checkpoint, if it has one, under its new name and with the base."""
    old = source.resolve().name
    try:
        text = (source / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = CARD.format(name=old, sizes=describe_model(reasoner).sizes)
    text = text.replace(f"\n# {old}\n", f"\n# {name}\n")
    text = re.sub(rf"(?<=--model ){re.escape(shlex.quote(old))}(?=\s)", shlex.quote(name), text)
    if reference.hub_id is None:
        package = PACKAGED[reference.name].distribution
        where = f"`{reference.name}`, from the package `{package}`, version {reference.revision}"
    else:
        where = f"`{reference.hub_id}`, revision `{reference.revision}`"
        if "\nbase_model:" not in text:
            text = re.sub("^---\n", f"---\nbase_model: {reference.hub_id}\n", text)
    section = BASE_SECTION.format(
        where=where, sha256=reference.sha256, dtype=str(DTYPE).removeprefix("torch."), version=__version__
    )
    body = text.partition("\n## Base model\n")[0]  # without that of an earlier export
    return body.rstrip() + "\n" + section
