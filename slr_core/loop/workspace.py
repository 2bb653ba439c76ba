"""The workspace: which positions a loop refines, what an iteration runs, and what remains after the loop.

|                  | ``append``                   | ``block``                      | ``prompt``                     |
|------------------|------------------------------|--------------------------------|--------------------------------|
| h_0              | base state at the last       | K learned vectors              | the prompt's input embeddings  |
|                  | prompt position              |                                |                                |
| iteration t runs | one new position             | the K positions again, over    | all prompt positions again     |
|                  |                              | the prompt's cache             |                                |
| cache            | each thought stays           | only the prompt                | nothing                        |
| after the loop   | nothing                      | one closing pass over          | the same                       |
|                  |                              | project(h_t)                   |                                |

``append``: continuous thoughts (Coconut: Hao et al., 2024, arXiv 2412.06769). ``block``: latent positions refined
in place and in parallel (PCCoT, LOTUS: arXiv 2606.31779). ``prompt``: the whole prompt in every iteration, as in
recurrent-depth models (Huginn: Geiping et al., 2025, arXiv 2502.05171). A fourth workspace, ``token``, is in
:mod:`slr_core.loop.token_workspace`.

In every workspace, a row with 0 iterations gives exactly the base model.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slr_core.loop.context import Context


class WorkspaceModel(Protocol):
    """The methods that a workspace calls; :class:`slr_core.model.looped.LoopedModel` has them."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, q, d]``."""
        ...

    def project_in(self, hidden: Tensor) -> Tensor:
        """``project``: inputs ``[..., d]`` from states ``[..., d]``."""
        ...

    def feed_back(self, hidden: Tensor, prompt_state: Tensor | None) -> Tensor:
        """The projected states ``[..., W, d]`` that follow states ``[..., W, d]``."""
        ...

    def forward_chunk(self, context: Context, embeds: Tensor, present: Tensor, *, fed_back: bool = False) -> Tensor:
        """One pass with the active adapter: states ``[B, q, d]``; ``fed_back``: the inputs come from states."""
        ...

    def forward_after_loop(self, context: Context, embeds: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """One pass after the loop: states ``[B, q, d]``, with the adapter ``decode``, if any, in ``looped`` rows."""
        ...


class Workspace(nn.Module):
    """Base of the workspaces. Holds learned vectors at most; the state of a run is in the :class:`Context`."""

    starts_from_state = False
    """Whether h_0 is a state. If not, it is an input, and no distance is defined at t = 1."""
    prefills = True
    """Whether the base model runs the prompt before the loop."""
    per_token = False
    """Whether every position of the answer runs a loop of its own."""

    def begin(self, model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
        """The context before the first iteration, for prompt ids ``[B, L]`` and the mask ``[B, L]`` of real tokens."""
        raise NotImplementedError

    def initial_state(self, prompt: Tensor) -> Tensor:
        """h_0 ``[W, d]`` of one row.

        Args:
            prompt: the state ``[d]`` after the prompt, or the prompt's input embeddings ``[P, d]`` if
                :attr:`prefills` is false.
        """
        raise NotImplementedError

    def run(self, model: WorkspaceModel, context: Context, u: Tensor, active: Tensor, t: int) -> Tensor:
        """The forward pass of iteration ``t``: g_t ``[B, W, d]`` from u_t ``[B, W, d]`` in ``active`` ``[B]`` rows."""
        raise NotImplementedError

    def close(self, model: WorkspaceModel, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """Prepare ``context`` for the answer, as if each row's loop had ended after ``kept_iterations`` iterations.

        Args:
            model: runs the closing pass, if there is one.
            context: after the last iteration; changed in place.
            states: ``[B, T + 1, W, d]``, h_0 first.
            kept_iterations: ``[B]`` long, iterations per row.
        """
        raise NotImplementedError

    def passes(self, t: int) -> int:
        """Forward passes of one row until iteration ``t`` is done, the prompt's included."""
        return 1 + t

    def closing_passes(self, kept_iterations: int) -> int:
        """Forward passes between the loop and the first token, with ``kept_iterations`` iterations kept_iterations."""
        raise NotImplementedError

    def loop_positions(self, iterations: int) -> int:
        """Cache positions that a loop of at most ``iterations`` needs besides the prompt's."""
        raise NotImplementedError

    def width(self, prompt_tokens: int) -> int:
        """W, the workspace positions of one row with a prompt of ``prompt_tokens`` tokens."""
        raise NotImplementedError

    def measured(self, states: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the exit criterion compares, of states ``[B, W, d]`` and their valid positions ``[B, W]`` bool: all."""
        return states, valid_mask

    def cache_copies(self, max_iterations: int) -> int:
        """Key/value caches of one row whose loops run at most ``max_iterations`` iterations: 1."""
        return 1

    def memory(self, states: Tensor, kept_iterations: int) -> Tensor:
        """The states ``[S, d]`` that the latent decoder reads, from one row's states ``[t + 1, W, d]``."""
        return states[kept_iterations]


class Append(Workspace):
    """A chain of continuous thoughts: iteration t adds one position, and earlier thoughts stay visible."""

    starts_from_state = True

    def begin(self, model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
        """Prefill; h_0 is the state at the last prompt position."""
        context = _prefill(model, input_ids, present)
        context.initial = context.hidden = context.state[:, None]
        return context

    def initial_state(self, prompt: Tensor) -> Tensor:
        """The state at the last prompt position."""
        return prompt[None]

    def run(self, model: WorkspaceModel, context: Context, u: Tensor, active: Tensor, t: int) -> Tensor:
        """One new position, invisible in inactive rows."""
        return model.forward_chunk(context, u, active[:, None])

    def close(self, model: WorkspaceModel, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """Hide the thoughts after ``kept_iterations``; the first token is read at the last visible one."""
        iterations = states.shape[1] - 1
        dropped = torch.arange(1, iterations + 1, device=kept_iterations.device) > kept_iterations[:, None]
        start = context.visible.shape[1] - iterations
        ran = context.visible[:, start:]
        context.next_position = context.next_position - (ran & dropped).sum(-1)
        context.visible = torch.cat([context.visible[:, :start], ran & ~dropped], dim=1)
        context.hidden = _at(states, kept_iterations)
        context.state = context.hidden[:, 0]

    def closing_passes(self, kept_iterations: int) -> int:
        """0: the first token is read at the last thought."""
        return 0

    def loop_positions(self, iterations: int) -> int:
        """One per iteration."""
        return iterations

    def width(self, prompt_tokens: int) -> int:
        """1."""
        return 1

    def memory(self, states: Tensor, kept_iterations: int) -> Tensor:
        """All thoughts in order: ``[kept_iterations, d]``."""
        return states[1 : kept_iterations + 1, 0]


class Block(Workspace):
    """K latent positions after the prompt, refined in place and in parallel; attention inside is causal."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.size = size
        self.vectors = nn.Parameter(0.02 * torch.randn(size, hidden_size))

    def begin(self, model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
        """Prefill; h_0 is the learned vectors."""
        context = _prefill(model, input_ids, present)
        context.initial = context.hidden = self.vectors.expand(len(input_ids), -1, -1)
        context.valid_mask = present.new_ones(len(input_ids), self.size)
        return context

    def initial_state(self, prompt: Tensor) -> Tensor:
        """The learned vectors."""
        return self.vectors

    def run(self, model: WorkspaceModel, context: Context, u: Tensor, active: Tensor, t: int) -> Tensor:
        """The K positions over the prompt's cache, which does not change."""
        return model.forward_chunk(context.fork(), u, context.valid_mask & active[:, None])

    def close(self, model: WorkspaceModel, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """The closing pass; rows that kept_iterations no iteration have no block."""
        looped = kept_iterations > 0
        context.hidden = _at(states, kept_iterations)
        if not looped.any():
            return
        inputs = model.feed_back(context.hidden, context.state)
        closed = model.forward_after_loop(context, inputs, context.valid_mask & looped[:, None], looped)
        context.state = torch.where(looped[:, None], closed[:, -1], context.state)

    def closing_passes(self, kept_iterations: int) -> int:
        """1 after a loop, else 0."""
        return int(kept_iterations > 0)

    def loop_positions(self, iterations: int) -> int:
        """K, whatever the number of iterations; 0 without a loop."""
        return self.size if iterations else 0

    def width(self, prompt_tokens: int) -> int:
        """K."""
        return self.size


class Prompt(Workspace):
    """The prompt's own positions, refined in place; no position is added."""

    prefills = False

    def begin(self, model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
        """No pass; h_0 is the input embeddings."""
        return empty_context(model.embed(input_ids), present)

    def initial_state(self, prompt: Tensor) -> Tensor:
        """The prompt's input embeddings."""
        return prompt

    def run(self, model: WorkspaceModel, context: Context, u: Tensor, active: Tensor, t: int) -> Tensor:
        """All prompt positions; the cache does not change."""
        return model.forward_chunk(context.fork(), u, context.valid_mask & active[:, None])

    def close(self, model: WorkspaceModel, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """The closing pass; rows that kept_iterations no iteration run the base model on their prompt."""
        looped = kept_iterations > 0
        context.hidden = _at(states, kept_iterations)
        inputs = torch.where(looped[:, None, None], model.project_in(context.hidden), states[:, 0])
        closed = model.forward_after_loop(context, inputs, context.valid_mask, looped)
        context.state = readout(closed, context.valid_mask)

    def passes(self, t: int) -> int:
        """``t``: the prompt is not run before the loop."""
        return t

    def closing_passes(self, kept_iterations: int) -> int:
        """1, also without a loop."""
        return 1

    def loop_positions(self, iterations: int) -> int:
        """0."""
        return 0

    def width(self, prompt_tokens: int) -> int:
        """The prompt's length."""
        return prompt_tokens


def readout(hidden: Tensor, valid_mask: Tensor | None) -> Tensor:
    """The state at each row's last valid position.

    Args:
        hidden: ``[B, ..., W, d]``.
        valid_mask: ``[B, W]`` bool; ``None``: all positions are valid.

    Returns:
        ``[B, ..., d]``.
    """
    if valid_mask is None:
        return hidden[..., -1, :]
    last = (valid_mask * torch.arange(1, valid_mask.shape[1] + 1, device=valid_mask.device)).argmax(-1)
    return hidden[torch.arange(len(valid_mask), device=valid_mask.device), ..., last, :]


def _prefill(model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
    embeds = model.embed(input_ids)
    context = empty_context(embeds, present)
    context.state = readout(model.forward_chunk(context, embeds, present), present)
    context.valid_mask = present.new_ones(len(input_ids), 1)
    return context


def empty_context(embeds: Tensor, present: Tensor) -> Context:
    """A context without cache positions, whose h_0 is ``embeds`` ``[B, W, d]``, with ``present`` ``[B, W]`` bool."""
    rows, device = len(embeds), embeds.device
    return Context(
        cache=DynamicCache(),
        visible=present.new_zeros(rows, 0),
        next_position=torch.zeros(rows, dtype=torch.long, device=device),
        state=embeds[:, 0],
        initial=embeds,
        hidden=embeds,
        valid_mask=present,
        change=torch.full((rows,), torch.nan, device=device),
    )


def _at(states: Tensor, kept_iterations: Tensor) -> Tensor:
    return states[torch.arange(len(kept_iterations), device=kept_iterations.device), kept_iterations]
