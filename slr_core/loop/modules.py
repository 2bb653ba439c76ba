"""The loop's own modules: everything that a config describes besides the base model and its adapters."""

from __future__ import annotations

from typing import NamedTuple, Self

from slr_core.config import LoopConfig
from slr_core.loop.halting import HaltingHead
from slr_core.loop.latent_decoder import LatentDecoder
from slr_core.loop.projection import Projection
from slr_core.loop.residual import Residual
from slr_core.loop.timestep import Timestep
from slr_core.loop.token_workspace import Token
from slr_core.loop.workspace import Append, Block, Prompt, Workspace


class LoopModules(NamedTuple):
    """The loop's own modules, by the names that their weights have in a checkpoint."""

    workspace: Workspace
    project: Projection
    timestep: Timestep
    residual: Residual
    halting: HaltingHead | None
    decoder: LatentDecoder | None

    @classmethod
    def build(cls, loop: LoopConfig, hidden_size: int) -> Self:
        """Untrained modules for a base model of this hidden size."""
        latent = loop.decoder.latent_decoder
        return cls(
            workspace=build_workspace(loop, hidden_size),
            project=Projection(loop.projection, hidden_size),
            timestep=Timestep(loop.timestep, hidden_size, loop.trained_iterations),
            residual=Residual(loop.residual, hidden_size),
            halting=HaltingHead(hidden_size) if loop.halting_head else None,
            decoder=None if latent is None else LatentDecoder(latent, hidden_size),
        )


def build_workspace(loop: LoopConfig, hidden_size: int) -> Workspace:
    """The workspace that ``loop`` names, with untrained vectors."""
    match loop.workspace:
        case "append":
            return Append()
        case "block":
            return Block(loop.block_size, hidden_size)
        case "prompt":
            return Prompt()
        case "token":
            return Token(loop.deeper_cache == "shared")
