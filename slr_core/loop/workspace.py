"""The workspace: which positions a loop refines, what an iteration runs, and what stays when it ends.

|                  | ``append``                   | ``block``                      | ``prompt``                     |
|------------------|------------------------------|--------------------------------|--------------------------------|
| h_0              | base state at the last       | K learned vectors              | the prompt's input embeddings  |
|                  | prompt position              |                                |                                |
| iteration t runs | one new position             | the K positions again, over    | all prompt positions again     |
|                  |                              | the prompt's cache             |                                |
| cache            | each thought stays           | the prompt alone               | nothing                        |
| after the loop   | nothing                      | one closing pass over          | the same                       |
|                  |                              | project(h_t)                   |                                |

``append``: continuous thoughts (Coconut: Hao et al., 2024, arXiv 2412.06769). ``block``: latent positions refined
in place and in parallel (PCCoT, LOTUS: arXiv 2606.31779). ``prompt``: the whole prompt again and again, as in
recurrent-depth models (Huginn: Geiping et al., 2025, arXiv 2502.05171).

A row whose loop ran no iteration is exactly the base model, in every workspace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slr_core.model.context import Context

if TYPE_CHECKING:
    from slr_core.config import LoopConfig


class Runner(Protocol):
    """What a workspace asks of the model around it; :class:`slr_core.model.reasoner.LatentReasoner` is one."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[B, q, d]``."""
        ...

    def project_in(self, hidden: Tensor) -> Tensor:
        """``project``: inputs ``[..., d]`` from states ``[..., d]``."""
        ...

    def forward_chunk(self, context: Context, embeds: Tensor, present: Tensor) -> Tensor:
        """One pass with whatever adapter is active: states ``[B, q, d]``."""
        ...

    def write(self, context: Context, embeds: Tensor, present: Tensor, looped: Tensor) -> Tensor:
        """One pass after the loop: with the adapter ``decode`` in ``looped`` rows, where there is one."""
        ...


class Workspace(nn.Module):
    """A way of looping. Stateless but for learned vectors; what runs lies in the :class:`Context`."""

    starts_from_state = False
    """Whether h_0 is a state; where it is an input, no distance is defined at t = 1."""
    prefills = True
    """Whether the plain prompt is run before the loop."""

    def begin(self, model: Runner, input_ids: Tensor, present: Tensor) -> Context:
        """What there is before the first iteration, for prompts ``[B, L]`` and their mask."""
        raise NotImplementedError

    def first(self, prompt: Tensor) -> Tensor:
        """h_0 ``[W, d]`` of one row, from its state ``[d]`` after the prompt, or from its prompt's input embeddings
        ``[P, d]`` where nothing is run before the loop."""
        raise NotImplementedError

    def run(self, model: Runner, context: Context, u: Tensor, active: Tensor) -> Tensor:
        """The forward pass of an iteration: g_t ``[B, W, d]`` from u_t ``[B, W, d]`` in ``active`` ``[B]`` rows."""
        raise NotImplementedError

    def close(self, model: Runner, context: Context, states: Tensor, kept: Tensor) -> None:
        """Make ``context`` ready to write the answer, as if each row's loop had ended after ``kept`` iterations.

        Args:
            model: runs the closing pass, where there is one.
            context: after the last iteration; it is changed in place.
            states: ``[B, T + 1, W, d]``, h_0 first.
            kept: ``[B]`` long.
        """
        raise NotImplementedError

    def passes(self, t: int) -> int:
        """Forward passes of a lone row until ``t`` iterations are done, those of its prompt included."""
        return 1 + t

    def closing_passes(self, kept: int) -> int:
        """Those from there to the first token."""
        raise NotImplementedError

    def loop_positions(self, iterations: int) -> int:
        """Positions beyond the prompt's that a loop of at most ``iterations`` takes."""
        raise NotImplementedError

    def width(self, prompt_tokens: int) -> int:
        """W, the positions of one row with a prompt of so many tokens."""
        raise NotImplementedError

    def memory(self, states: Tensor, kept: int) -> Tensor:
        """What the loop of one row leaves for the latent decoder: ``[S, d]`` from its states ``[t + 1, W, d]``."""
        return states[kept]


class Append(Workspace):
    """A chain of continuous thoughts: iteration t adds one position, and earlier thoughts stay visible."""

    starts_from_state = True

    def begin(self, model: Runner, input_ids: Tensor, present: Tensor) -> Context:
        """Prefill; h_0 is the state at the last prompt position."""
        context = _prefill(model, input_ids, present)
        context.initial = context.hidden = context.state[:, None]
        return context

    def first(self, prompt: Tensor) -> Tensor:
        """The state itself."""
        return prompt[None]

    def run(self, model: Runner, context: Context, u: Tensor, active: Tensor) -> Tensor:
        """One new position; an inactive row's stays invisible."""
        return model.forward_chunk(context, u, active[:, None])

    def close(self, model: Runner, context: Context, states: Tensor, kept: Tensor) -> None:
        """Drop the thoughts after ``kept``; the first token is read at the last one that stays."""
        iterations = states.shape[1] - 1
        dropped = torch.arange(1, iterations + 1, device=kept.device) > kept[:, None]
        start = context.visible.shape[1] - iterations
        ran = context.visible[:, start:]
        context.next_position = context.next_position - (ran & dropped).sum(-1)
        context.visible = torch.cat([context.visible[:, :start], ran & ~dropped], dim=1)
        context.hidden = _at(states, kept)
        context.state = context.hidden[:, 0]

    def closing_passes(self, kept: int) -> int:
        """None: the last thought is read as it is."""
        return 0

    def loop_positions(self, iterations: int) -> int:
        """One an iteration."""
        return iterations

    def width(self, prompt_tokens: int) -> int:
        """One."""
        return 1

    def memory(self, states: Tensor, kept: int) -> Tensor:
        """All thoughts in order: ``[kept, d]``."""
        return states[1 : kept + 1, 0]


class Block(Workspace):
    """K latent positions after the prompt, refined in place and in parallel; attention inside is causal."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.size = size
        self.vectors = nn.Parameter(0.02 * torch.randn(size, hidden_size))

    def begin(self, model: Runner, input_ids: Tensor, present: Tensor) -> Context:
        """Prefill; h_0 is the learned vectors."""
        context = _prefill(model, input_ids, present)
        context.initial = context.hidden = self.vectors.expand(len(input_ids), -1, -1)
        context.valid_mask = present.new_ones(len(input_ids), self.size)
        return context

    def first(self, prompt: Tensor) -> Tensor:
        """The learned vectors."""
        return self.vectors

    def run(self, model: Runner, context: Context, u: Tensor, active: Tensor) -> Tensor:
        """The K positions over the prompt's cache, which they leave as it is."""
        return model.forward_chunk(context.fork(), u, context.valid_mask & active[:, None])

    def close(self, model: Runner, context: Context, states: Tensor, kept: Tensor) -> None:
        """The closing pass; rows that kept no iteration have no block at all."""
        looped = kept > 0
        context.hidden = _at(states, kept)
        if not looped.any():
            return
        inputs = model.project_in(context.hidden)
        written = model.write(context, inputs, context.valid_mask & looped[:, None], looped)
        context.state = torch.where(looped[:, None], written[:, -1], context.state)

    def closing_passes(self, kept: int) -> int:
        """One after a loop."""
        return int(kept > 0)

    def loop_positions(self, iterations: int) -> int:
        """K, however often they are refined."""
        return self.size if iterations else 0

    def width(self, prompt_tokens: int) -> int:
        """K."""
        return self.size


class Prompt(Workspace):
    """The prompt's own positions, refined again and again; no position is added."""

    prefills = False

    def begin(self, model: Runner, input_ids: Tensor, present: Tensor) -> Context:
        """No pass at all; h_0 is the input embeddings."""
        return _empty(model.embed(input_ids), present)

    def first(self, prompt: Tensor) -> Tensor:
        """The embeddings themselves."""
        return prompt

    def run(self, model: Runner, context: Context, u: Tensor, active: Tensor) -> Tensor:
        """All prompt positions, nothing kept."""
        return model.forward_chunk(context.fork(), u, context.valid_mask & active[:, None])

    def close(self, model: Runner, context: Context, states: Tensor, kept: Tensor) -> None:
        """The closing pass; rows that kept no iteration run the base model on their prompt."""
        looped = kept > 0
        context.hidden = _at(states, kept)
        inputs = torch.where(looped[:, None, None], model.project_in(context.hidden), states[:, 0])
        written = model.write(context, inputs, context.valid_mask, looped)
        context.state = readout(written, context.valid_mask)

    def passes(self, t: int) -> int:
        """The iterations alone: the prompt is not run before them."""
        return t

    def closing_passes(self, kept: int) -> int:
        """One, with or without a loop before it."""
        return 1

    def loop_positions(self, iterations: int) -> int:
        """None."""
        return 0

    def width(self, prompt_tokens: int) -> int:
        """The prompt's length."""
        return prompt_tokens


def build(loop: LoopConfig, hidden_size: int) -> Workspace:
    """The workspace that a config names."""
    match loop.workspace:
        case "append":
            return Append()
        case "block":
            return Block(loop.block_size, hidden_size)
        case "prompt":
            return Prompt()


def readout(hidden: Tensor, valid_mask: Tensor | None) -> Tensor:
    """The state at the last own position: ``[B, ..., d]`` from ``[B, ..., W, d]`` and ``[B, W]``; ``None``: all own."""
    if valid_mask is None:
        return hidden[..., -1, :]
    last = (valid_mask * torch.arange(1, valid_mask.shape[1] + 1, device=valid_mask.device)).argmax(-1)
    return hidden[torch.arange(len(valid_mask), device=valid_mask.device), ..., last, :]


def _prefill(model: Runner, input_ids: Tensor, present: Tensor) -> Context:
    embeds = model.embed(input_ids)
    context = _empty(embeds, present)
    context.state = readout(model.forward_chunk(context, embeds, present), present)
    context.valid_mask = present.new_ones(len(input_ids), 1)
    return context


def _empty(embeds: Tensor, present: Tensor) -> Context:
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


def _at(states: Tensor, kept: Tensor) -> Tensor:
    return states[torch.arange(len(kept), device=kept.device), kept]
