"""The workspace ``token``: every position, those of the answer included, is looped before the next one is written.

h_0 of a position is its input embedding. Iteration t runs it with L_t, and attends to what iteration t left of earlier
positions: one key/value cache per iteration. All positions of the prompt run the same number of iterations, each
position of the answer runs its own loop. At iterations that a position did not reach, later ones attend to the keys and
values of its last iteration (``deeper_cache: copy``); or there is one cache, which holds those of every position's last
iteration (``shared``).

Recursive and looped language models: Relaxed Recursive Transformer (Bae et al., 2024, arXiv 2410.20672), Ouro.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from slr_core.loop.context import Context
from slr_core.loop.workspace import Workspace, WorkspaceModel, empty_context, readout


class Token(Workspace):
    """Every position is looped. The answer's positions are added by :meth:`extend`, one or several at a time.

    Args:
        shared_cache: whether one cache serves all iterations of the answer's positions.
    """

    prefills = False
    per_token = True

    def __init__(self, shared_cache: bool) -> None:
        super().__init__()
        self.shared_cache = shared_cache

    def begin(self, model: WorkspaceModel, input_ids: Tensor, present: Tensor) -> Context:
        """No pass; h_0 is the input embeddings. ``context.cache`` is for rows without iterations."""
        return empty_context(model.embed(input_ids), present)

    def extend(self, context: Context, embeds: Tensor, present: Tensor) -> None:
        """Begin the loop of the next positions, after :meth:`close`.

        Args:
            context: changed in place.
            embeds: their input embeddings ``[B, q, d]``.
            present: ``[B, q]`` bool, the real ones.
        """
        context.initial = context.hidden = embeds
        context.valid_mask = present

    def initial_state(self, prompt: Tensor) -> Tensor:
        """The input embeddings."""
        return prompt

    def run(self, model: WorkspaceModel, context: Context, u: Tensor, active: Tensor, t: int) -> Tensor:
        """The positions over the cache of iteration ``t``, which does not change before :meth:`close`."""
        if context.depths is None:
            attended = empty_context(u, context.valid_mask)
        else:
            attended = context.caches[0 if self.shared_cache else t - 1].fork()
        attended.next_position, attended.passes = context.next_position, context.passes
        g = model.forward_chunk(attended, u, context.valid_mask & active[:, None], fed_back=t > 1)
        context.runs.append(attended)
        return g

    def close(self, model: WorkspaceModel, context: Context, states: Tensor, kept_iterations: Tensor) -> None:
        """Write the caches; rows without iterations run the base model.

        The first call is for the prompt. ``context.depths`` holds the iterations that later positions may run then;
        ``None``: as many as were kept.
        """
        depths = kept_iterations if context.depths is None else context.depths
        looped, start = depths > 0, context.next_position
        kept = torch.where(looped, kept_iterations.clamp_min(1), 0).clamp_max(states.shape[1] - 1)
        hidden = states[torch.arange(len(kept), device=kept.device), kept]
        context.state = hidden[:, 0] if hidden.shape[1] == 1 else readout(hidden, context.valid_mask)
        if context.runs:
            kept = kept.clamp_min(1)
            context.caches = (
                self._grow(context, kept, depths) if context.caches else self._first_banks(context.runs, depths)
            )
        if (context.valid_mask & ~looped[:, None]).any():
            plain = model.forward_chunk(context, context.initial, context.valid_mask & ~looped[:, None])
            context.state = torch.where(looped[:, None], context.state, readout(plain, context.valid_mask))
        context.next_position = start + context.valid_mask.sum(-1)
        context.depths, context.runs = depths, []

    def _first_banks(self, runs: Sequence[Context], depths: Tensor) -> list[Context]:
        """The caches after the prompt: one per iteration; or that of each row's last one, if it is shared."""
        if not self.shared_cache:
            for t, run in enumerate(runs, start=1):
                run.visible = run.visible & (depths >= t)[:, None]
                _clean(run)
            return list(runs)
        return [_joined(None, runs, depths.clamp_min(1), runs[0].visible & (depths > 0)[:, None])]

    def _grow(self, context: Context, kept: Tensor, depths: Tensor) -> list[Context]:
        """The caches with the positions that have just been looped."""
        present = context.valid_mask
        return [
            _joined(
                earlier,
                context.runs,
                kept if self.shared_cache else kept.clamp_max(t),
                torch.cat([earlier.visible, present & (depths >= t)[:, None]], dim=1),
            )
            for t, earlier in enumerate(context.caches, start=1)
        ]

    def measured(self, states: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last valid position alone: the next token is read there."""
        return readout(states, valid_mask)[:, None], None

    def cache_copies(self, max_iterations: int) -> int:
        """One per iteration; 1 if the cache is shared."""
        return 1 if self.shared_cache else max(1, max_iterations)

    def passes(self, t: int) -> int:
        """``t``: the prompt is not run before the loop."""
        return t

    def closing_passes(self, kept_iterations: int) -> int:
        """1 without a loop, else 0."""
        return int(kept_iterations == 0)

    def loop_positions(self, iterations: int) -> int:
        """0."""
        return 0

    def width(self, prompt_tokens: int) -> int:
        """The prompt's length."""
        return prompt_tokens


def _joined(earlier: Context | None, runs: Sequence[Context], chosen: Tensor, visible: Tensor) -> Context:
    """A cache of ``earlier``'s positions, then each row's new ones as they are in ``runs[chosen - 1]``.

    Args:
        earlier: the cache before; ``None``: there is none.
        runs: caches of the iterations, each with the earlier positions first.
        chosen: ``[B]`` long, the iteration, from 1, whose keys and values are kept.
        visible: ``[B, S]`` bool of the result.
    """
    chosen = chosen.clamp_max(len(runs)) - 1
    rows = torch.arange(len(chosen), device=chosen.device)
    start = 0 if earlier is None else earlier.visible.shape[1]
    before = (
        [[] for _ in runs[0].cache.layers]
        if earlier is None
        else [[(keys, values)] for _, keys, values in earlier.layers()]
    )
    per_run = [[(keys, values) for _, keys, values in run.layers()] for run in runs]
    cache = DynamicCache()
    for index, kept in enumerate(before):
        keys, values = (
            torch.cat(
                [
                    *(pair[part] for pair in kept),
                    torch.stack([x[index][part][..., start:, :] for x in per_run])[chosen, rows],
                ],
                dim=-2,
            )
            for part in (0, 1)
        )
        cache.update(keys, values, index)
    joined = empty_context(runs[0].initial, runs[0].valid_mask)
    joined.cache, joined.visible = cache, visible
    _clean(joined)
    return joined


def _clean(context: Context) -> None:
    # A masked NaN still poisons attention: 0 * NaN is NaN.
    for layer, keys, values in context.layers():
        if not (keys.isfinite().all() and values.isfinite().all()):
            layer.keys = torch.nan_to_num(keys, 0.0, 0.0, 0.0)
            layer.values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
