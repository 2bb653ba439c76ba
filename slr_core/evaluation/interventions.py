"""Interfering with thoughts: noise while a loop runs, or other thoughts in place of its own.

If an answer does not depend on what the states hold, replacing them changes nothing: these are the controls
that tell thinking from extra passes. Every function returns a :data:`slr_core.generation.reference.RunLoop` for one
batch; its randomness is drawn row by row, so that a row's batch does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slr_core.errors import ConfigError
from slr_core.generation.reference import RunLoop
from slr_core.loop.context import Context
from slr_core.model.exits import LoopOutput, loop_until_exit
from slr_core.model.reasoner import LatentReasoner
from slr_core.params import ResolvedLoopParams

Edit = Callable[[list[Tensor]], list[Tensor]]
"""From every row's kept states ``[t + 1, W, d]``, h_0 first, to those that take their place."""


def add_noise(reasoner: LatentReasoner, scale: float, seeds: Sequence[int], *, start_only: bool = False) -> RunLoop:
    """Gaussian noise on h_0 and, unless ``start_only``, on every h_t; ``scale`` is its share of a state's RMS."""

    def run_loop(context: Context, settings: Sequence[ResolvedLoopParams]) -> LoopOutput:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def disturb(hidden: Tensor) -> Tensor:
            noise = torch.zeros_like(hidden)
            for row, generator in enumerate(generators):
                own = context.valid_mask[row]
                drawn = torch.randn(int(own.sum()), hidden.shape[-1], generator=generator)
                noise[row, own] = drawn.to(noise)
            return hidden + scale * hidden.float().pow(2).mean(-1, keepdim=True).sqrt().to(hidden.dtype) * noise

        context.initial = context.hidden = disturb(context.hidden)
        if start_only:
            return loop_until_exit(reasoner, context, settings)
        hook = reasoner.residual.register_forward_hook(lambda _module, _inputs, h: disturb(h))
        try:
            return loop_until_exit(reasoner, context, settings)
        finally:
            hook.remove()

    return run_loop


def replace_states(reasoner: LatentReasoner, edit: Edit) -> RunLoop:
    """Let every loop run, then run it again on states that ``edit`` put in place of its own."""

    def run_loop(context: Context, settings: Sequence[ResolvedLoopParams]) -> LoopOutput:
        # The prompt as it was before the loop grew the context.
        again = context.fork()
        output = loop_until_exit(reasoner, context, settings)
        kept = torch.tensor(output.kept_iterations, device=reasoner.device)
        own = [states[: count + 1] for states, count in zip(output.states, output.kept_iterations, strict=True)]
        edited = edit(own)
        states = _padded(edited, again)
        for t in range(1, states.shape[1]):
            again.hidden = states[:, t - 1]
            reasoner.iterate(again, t, kept >= t)
        reasoner.close(again, states, kept)
        # The latent decoder reads them, and not the context.
        put = [torch.cat([new, old[len(new) :]]) for new, old in zip(edited, output.states, strict=True)]
        return replace(output, context=again, states=put)

    return run_loop


def _padded(rows: list[Tensor], context: Context) -> Tensor:
    states = context.hidden[:, None].repeat(1, max(len(row) for row in rows), 1, 1)
    for i, row in enumerate(rows):
        states[i, : len(row), context.valid_mask[i]] = row.to(states)
    return states


def shuffle_thoughts(seeds: Sequence[int]) -> Edit:
    """Every row's thoughts in another order."""

    def edit(rows: list[Tensor]) -> list[Tensor]:
        return [_shuffle(row, torch.Generator().manual_seed(seed)) for row, seed in zip(rows, seeds, strict=True)]

    return edit


def _shuffle(row: Tensor, generator: torch.Generator) -> Tensor:
    thoughts = len(row) - 1
    if thoughts < 2:
        return row
    order = torch.arange(thoughts)
    while bool((order == torch.arange(thoughts)).all()):
        order = torch.randperm(thoughts, generator=generator)
    return torch.cat([row[:1], row[1:][order.to(row.device)]])


def randomize_thoughts(seeds: Sequence[int]) -> Edit:
    """Noise of the same lengths in place of every row's thoughts."""

    def edit(rows: list[Tensor]) -> list[Tensor]:
        edited = []
        for row, seed in zip(rows, seeds, strict=True):
            drawn = torch.randn(row[1:].shape, generator=torch.Generator().manual_seed(seed)).to(row)
            lengths = row[1:].norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            edited.append(torch.cat([row[:1], drawn * lengths]))
        return edited

    return edit


def swap_thoughts(rows: list[Tensor]) -> list[Tensor]:
    """Every row gets the thoughts of the row before it, the last of them repeated where they are too few.

    Raises:
        ConfigError: the rows' workspaces differ in size, as prompts do.
    """
    if len({row.shape[1] for row in rows}) > 1:
        raise ConfigError("foreign thoughts need a workspace of one size; that of `prompt` is the prompt's")
    edited = []
    for i, row in enumerate(rows):
        thoughts = rows[i - 1][1:]
        if len(thoughts) == 0:
            edited.append(row)
            continue
        taken = torch.arange(len(row) - 1, device=row.device).clamp_max(len(thoughts) - 1)
        edited.append(torch.cat([row[:1], thoughts[taken]]))
    return edited
