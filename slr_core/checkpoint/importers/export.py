"""``slr export``: write a checkpoint folder in a published form, where that form can express its loop."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from slr_core.checkpoint.folder import BASE, MODULES
from slr_core.checkpoint.hub import checkpoint_folder
from slr_core.checkpoint.importers.coconut import END, LATENT, PREFIX, START, TEXT, chain
from slr_core.checkpoint.importers.lotus import block
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.written_whole import check_new, check_outside, written_whole
from slr_core.config import LoopConfig, TextConfig
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel
from slr_core.validation import validated

Form = Literal["coconut", "hf"]
STATE = "checkpoint_1"
"""Name of the state dict, as Coconut's script numbers its own."""


def export_checkpoint(model: str | None, out: str | Path, form: Form) -> str:
    """Write a checkpoint folder for other projects.

    ``hf`` is a transformers folder with the three marker tokens, the published form of Coconut and LOTUS. ``coconut``
    is the state dict of Coconut's script, ``checkpoint_1``, beside the folder ``base`` that it was trained from.
    Numbers of thoughts and loops are in no file of either form.

    Args:
        model: a folder, a hub id or a bundled name.
        out: the folder to write; it must be new or empty.
        form: which form.

    Returns:
        The import that gives the same folder again, as a command.

    Raises:
        ConfigError: the form cannot express the checkpoint's loop or texts; the message names what differs.
        CheckpointError: the checkpoint cannot be loaded.
    """
    out = Path(out)
    check_new(out)
    check_outside(out, checkpoint_folder(model))
    reasoner = load_checkpoint(LoopedModel, model)
    lotus = _check_expressible(reasoner)
    if lotus and form == "coconut":
        raise ConfigError("a block of latent positions is LOTUS's: --to hf writes its published form")
    loop = reasoner.config.loop
    with written_whole(out) as written:
        if form == "hf":
            _write_folder(reasoner, written)
        else:
            _write_state(reasoner, written)
    if lotus:
        return f"slr import lotus {out} --latents {loop.block_size} --iterations {loop.max_iterations} --out DIR"
    source = f"{out} " if form == "hf" else f"{out / STATE} --base {out / BASE} "
    return f"slr import coconut {source}--latents {loop.max_iterations} --out DIR"


def _check_expressible(reasoner: LoopedModel) -> bool:
    """Whether the loop is LOTUS's; if not, it is Coconut's."""
    config, vocab = reasoner.config, reasoner.tokenizer.get_vocab()
    loop, rows = config.loop, reasoner.vocab_size
    lotus = loop.workspace == "block"
    if lotus:
        wanted = validated(LoopConfig, block(loop.block_size, max(1, loop.max_iterations)))
    else:
        wanted = validated(LoopConfig, chain(min(64, max(1, loop.max_iterations))))
    for name in LoopConfig.model_fields:
        # Without adapters and timestep embedding, the trained depth changes nothing.
        if name != "trained_iterations" and getattr(loop, name) != getattr(wanted, name):
            raise ConfigError(
                f"loop.{name} cannot be expressed: the form has {getattr(wanted, name)!r}, this checkpoint "
                f"{getattr(loop, name)!r}"
            )
    text = validated(TextConfig, TEXT).model_copy(update={"max_new_tokens": config.text.max_new_tokens})
    for name in TextConfig.model_fields:
        if getattr(config.text, name) != getattr(text, name):
            raise ConfigError(f"text.{name} cannot be expressed: the form has {getattr(text, name)!r}")
    if [vocab.get(token) for token in (START, END, LATENT)] != [rows - 3, rows - 2, rows - 1]:
        raise ConfigError(f"the last three tokens must be {START}, {END} and {LATENT}")
    if lotus:
        vector = reasoner.embed(torch.tensor([rows - 1], device=reasoner.device))
        if not torch.equal(reasoner.workspace.state_dict()["vectors"], vector.expand(loop.block_size, -1)):
            raise ConfigError(f"the latent vectors ({MODULES}) cannot be expressed: they must be the row of {LATENT}")
    return lotus


def _write_folder(reasoner: LoopedModel, folder: Path) -> None:
    base: PreTrainedModel = reasoner.base
    base.save_pretrained(folder)
    reasoner.tokenizer.save_pretrained(folder)


def _write_state(reasoner: LoopedModel, folder: Path) -> None:
    base = reasoner.base
    state = OrderedDict((PREFIX + name, tensor.clone()) for name, tensor in base.state_dict().items())
    table = base.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    state["embedding.weight"] = table.detach().clone()
    torch.save(state, folder / STATE)
    # The base as it was before the three tokens were added: they are the tokenizer's last.
    config = type(base.config).from_dict(base.config.to_dict())
    config.vocab_size = reasoner.vocab_size - 3
    config.save_pretrained(folder / BASE)
    reasoner.tokenizer.save_pretrained(folder / BASE)
