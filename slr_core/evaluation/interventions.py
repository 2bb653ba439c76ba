"""Interventions on thoughts: noise while a loop runs, or other thoughts in place of the loop's.

If replacing the thoughts does not change an answer, the answer does not depend on their content: these controls
separate reasoning from the effect of additional passes. :func:`add_noise` and :func:`replace_states` return a
:data:`slr_core.generation.reference.RunLoop` for one batch. Random numbers are drawn per row, so that a row does not
depend on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slr_core.errors import ConfigError
from slr_core.generation.reference import RunLoop
from slr_core.loop.context import Context
from slr_core.loop.noise import perturb
from slr_core.model.exits import LoopOutput, loop_until_exit
from slr_core.params import ResolvedLoopParams
from slr_core.reasoner import LatentReasoner

Edit = Callable[[list[Tensor]], list[Tensor]]
"""Maps the states of every row, ``[kept_iterations + 1, W, d]`` from h_0 on, to those that replace them."""


def add_noise(reasoner: LatentReasoner, scale: float, seeds: Sequence[int], *, start_only: bool = False) -> RunLoop:
    """Add Gaussian noise to h_0 and, unless ``start_only``, to every h_t.

    Args:
        reasoner: the model.
        scale: standard deviation of the noise, as a share of a state's RMS.
        seeds: one per row.
        start_only: whether only h_0 is changed.
    """

    def run_loop(context: Context, settings: Sequence[ResolvedLoopParams]) -> LoopOutput:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def disturb(hidden: Tensor) -> Tensor:
            noised = hidden.clone()
            for row, generator in enumerate(generators):
                valid_mask = context.valid_mask[row]
                noised[row, valid_mask] = perturb(hidden[row, valid_mask], scale, generator)
            return noised

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
    """Run every loop, then run it again with its states replaced by what ``edit`` returns.

    Raises:
        ConfigError: the workspace is ``token``, whose answers do not depend on one loop alone.
    """
    if reasoner.workspace.per_token:
        raise ConfigError("replacing thoughts is not supported by workspace `token`: every token has a loop of its own")

    def run_loop(context: Context, settings: Sequence[ResolvedLoopParams]) -> LoopOutput:
        # The context before the loop extends it.
        again = context.fork()
        output = loop_until_exit(reasoner, context, settings)
        kept_iterations = torch.tensor(output.kept_iterations, device=reasoner.device)
        kept_states = [states[: count + 1] for states, count in zip(output.states, output.kept_iterations, strict=True)]
        edited = edit(kept_states)
        states = _padded(edited, again)
        for t in range(1, states.shape[1]):
            again.hidden = states[:, t - 1]
            reasoner.iterate(again, t, kept_iterations >= t)
        reasoner.close(again, states, kept_iterations)
        # The latent decoder reads these states, not the context.
        new_states = [torch.cat([new, old[len(new) :]]) for new, old in zip(edited, output.states, strict=True)]
        return replace(output, context=again, states=new_states)

    return run_loop


def _padded(rows: list[Tensor], context: Context) -> Tensor:
    states = context.hidden[:, None].repeat(1, max(len(row) for row in rows), 1, 1)
    for i, row in enumerate(rows):
        states[i, : len(row), context.valid_mask[i]] = row.to(states)
    return states


def shuffle_thoughts(seeds: Sequence[int]) -> Edit:
    """Shuffle the thoughts of every row."""

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
    """Replace the thoughts of every row by noise of the same norms."""

    def edit(rows: list[Tensor]) -> list[Tensor]:
        edited = []
        for row, seed in zip(rows, seeds, strict=True):
            noise = torch.randn(row[1:].shape, generator=torch.Generator().manual_seed(seed)).to(row)
            scale = row[1:].norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            edited.append(torch.cat([row[:1], noise * scale]))
        return edited

    return edit


def zero_thoughts(rows: list[Tensor]) -> list[Tensor]:
    """Replace the thoughts of every row by zeros."""
    return [torch.cat([row[:1], torch.zeros_like(row[1:])]) for row in rows]


def pause_thoughts(reasoner: LatentReasoner) -> Edit:
    """Replace every thought by the mean token embedding: a vector without content, for models with no pause token."""

    def edit(rows: list[Tensor]) -> list[Tensor]:
        pause = reasoner.base.get_input_embeddings().weight.mean(0)  # type: ignore[operator]
        return [torch.cat([row[:1], pause.to(row).expand_as(row[1:])]) for row in rows]

    return edit


def swap_thoughts(rows: list[Tensor]) -> list[Tensor]:
    """Give every row the thoughts of the row before it; if they are too few, the last thought is repeated.

    Raises:
        ConfigError: the rows' workspaces differ in size, as in the workspace ``prompt``.
    """
    if len({row.shape[1] for row in rows}) > 1:
        raise ConfigError(
            "foreign_thoughts needs a workspace of fixed size; in `prompt` the size is the length of the prompt"
        )
    edited = []
    for i, row in enumerate(rows):
        thoughts = rows[i - 1][1:]
        if len(thoughts) == 0:
            edited.append(row)
            continue
        indices = torch.arange(len(row) - 1, device=row.device).clamp_max(len(thoughts) - 1)
        edited.append(torch.cat([row[:1], thoughts[indices]]))
    return edited


def patch_state(reasoner: LatentReasoner, t: int, donors: Tensor) -> RunLoop:
    """Replace h_t of every row while the loop runs; the iterations after it go on from the replaced state.

    Args:
        reasoner: the model.
        t: the iteration whose state is replaced, 0 for h_0.
        donors: ``[B, W, d]``, the states that replace it.

    Raises:
        ConfigError: the workspace is ``token``, whose tokens have loops of their own.
    """
    if reasoner.workspace.per_token:
        raise ConfigError("patching states is not supported by workspace `token`: every token has a loop of its own")

    def run_loop(context: Context, settings: Sequence[ResolvedLoopParams]) -> LoopOutput:
        if t == 0:
            context.initial = context.hidden = donors.to(context.hidden)
            return loop_until_exit(reasoner, context, settings)
        iteration = 0

        def patch(_module: object, _inputs: object, h: Tensor) -> Tensor:
            nonlocal iteration
            iteration += 1
            return donors.to(h) if iteration == t else h

        hook = reasoner.residual.register_forward_hook(patch)
        try:
            return loop_until_exit(reasoner, context, settings)
        finally:
            hook.remove()

    return run_loop
