"""``slr import``: convert checkpoints of published latent reasoners. One module per peer, on a shared core."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from slr_core.checkpoint.importers.check import SelfCheck, run_self_check, widest_exact_dtype
from slr_core.checkpoint.importers.files import BASE_FROM_HUB, FROM_HUB, licence_of, local_source
from slr_core.checkpoint.importers.folder import write_card, write_folder
from slr_core.checkpoint.importers.peer import ImportOptions, Peer, PeerCheckpoint
from slr_core.checkpoint.read import load_checkpoint
from slr_core.checkpoint.written_whole import check_new, written_whole
from slr_core.errors import ConfigError
from slr_core.model.looped import LoopedModel

MODULES = {
    "coconut": "coconut",
    "simcot-coconut": "simcot_coconut",
    "codi": "codi",
    "simcot-codi": "simcot_codi",
    "lotus": "lotus",
    "pccot": "pccot",
    "ouro": "ouro",
}
"""Peers and the modules of their importers."""


@dataclass(frozen=True)
class Import:
    """What to import.

    Attributes:
        peer: a key of :data:`MODULES`.
        checkpoint: a file, a folder or a hub id.
        base: the base model, a folder or a hub id; ``None``: the checkpoint has what is needed of it.
        out: the folder to write; it must be new or empty.
        options: what no file says.
        revision: of the checkpoint, if it is a hub id.
        base_revision: of the base, if it is a hub id.
        dtype: of the written weights; ``None``: the widest of the checkpoint's.
        expect: the peer's recorded output, to be reproduced; ``None``: there is none.
    """

    peer: str
    checkpoint: str
    base: str | None
    out: Path
    options: ImportOptions
    revision: str | None = None
    base_revision: str | None = None
    dtype: torch.dtype | None = None
    expect: Path | None = None


def get_peer(name: str) -> Peer:
    """The peer of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MODULES:
        raise ConfigError(f"peer must be one of {', '.join(MODULES)}, got {name}")
    peer = import_module(f"{__name__}.{MODULES[name]}").PEER
    assert isinstance(peer, Peer)
    return peer


def import_checkpoint(request: Import) -> SelfCheck:
    """Convert a checkpoint, check the result, and write it. Where anything fails, nothing is written.

    Raises:
        ConfigError: an option is missing or wrong, or the folder is not empty.
        CheckpointError: the checkpoint or the base cannot be read or do not fit together, or the result does not
            reproduce what is expected of it.
    """
    out, peer = request.out, get_peer(request.peer)
    check_new(out)
    if request.expect is not None and not request.expect.is_file():
        raise ConfigError(f"--expect {request.expect}: no such file")
    checkpoint = local_source(request.checkpoint, request.revision, FROM_HUB)
    base = None
    if request.base is not None:
        base = local_source(
            request.base, request.base_revision, [*BASE_FROM_HUB, *(FROM_HUB if peer.reads_base_weights else [])]
        )
    conversion = peer.convert(PeerCheckpoint(checkpoint, base, request.options, request.dtype))
    with written_whole(out) as written:
        write_folder(conversion, written, request.dtype)
        reasoner = load_checkpoint(LoopedModel, written, dtype=widest_exact_dtype(request.dtype or conversion.dtype))
        check = run_self_check(reasoner, conversion.markers, peer.recorded, request.expect)
        write_card(
            conversion,
            written,
            peer=peer,
            name=out.name,
            checkpoint=_shown(request.checkpoint),
            base=None if request.base is None else _shown(request.base),
            licence=licence_of(checkpoint),
            command=command_line(request),
            check=describe_check(check),
        )
    return check


def command_line(request: Import) -> str:
    """The command that made a folder, with local paths cut to their names."""
    options = request.options
    words = ["slr", "import", request.peer, _shown(request.checkpoint), "--out", request.out.name]
    for flag, value in {
        "--base": None if request.base is None else _shown(request.base),
        "--revision": request.revision,
        "--base-revision": request.base_revision,
        "--latents": options.latents,
        "--iterations": options.iterations,
        "--lora-alpha": None if options.lora_alpha is None else f"{options.lora_alpha:g}",
        "--dtype": None if request.dtype is None else str(request.dtype).removeprefix("torch."),
    }.items():
        if value is not None:
            words += [flag, str(value)]
    words += [f"--{name.replace('_', '-')}" for name in ("keep_eos", "keep_adapter") if getattr(options, name)]
    return shlex.join(words)


def describe_check(check: SelfCheck) -> str:
    """The self-check in a sentence or two."""
    compared = check.comparison
    if compared is None:
        return "No recorded output of the peer's code was given to compare with."
    differences = {"thoughts": compared.thoughts, "logits of the first token": compared.logits}
    equal_to = "".join(f", {what} to {x:.1g}" for what, x in differences.items() if x is not None)
    return (
        f"Compared with recorded output of the peer's code: {compared.equal_answers} of {compared.cases} greedy answers"
        f" equal{equal_to}."
    )


def _shown(path_or_id: str) -> str:
    """A hub id as it is, a local path without the folders of this machine."""
    path = Path(path_or_id)
    return path.name if path.exists() else path_or_id
