"""Tiny checkpoints in the form in which the published projects leave them, written from random weights."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import tiny

COCONUT = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")


@dataclass
class Published:
    """A written checkpoint and what it was made of."""

    checkpoint: Path
    base: Path
    model: torch.nn.Module
    vocab: int

    def prompt(self, text, *markers):
        """Ids of a text and of markers, which are numbered from 0."""
        return [*tiny.ids(text), *(self.vocab + i for i in markers)]


def write_base(folder, kind):
    """Configuration and tokenizer of a tiny base, and its weights."""
    model = tiny.base(kind)
    model.config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def enlarge(model, count):
    """More rows for an embedding table and an LM head, random like the others."""
    torch.manual_seed(9)
    model.resize_token_embeddings(len(tiny.WORDS) + count, mean_resizing=False)
    return model


def coconut(folder, kind="gpt2", extra=None):
    """A state dict in the form of ``checkpoint_N``; ``extra`` adds tensors."""
    model = enlarge(write_base(folder / "base", kind), 3)
    state = OrderedDict((f"base_causallm.{name}", x.clone()) for name, x in model.state_dict().items())
    state["embedding.weight"] = model.get_input_embeddings().weight.detach().clone()
    torch.save(state | (extra or {}), folder / "checkpoint_7")
    return Published(folder / "checkpoint_7", folder / "base", model, len(tiny.WORDS))
