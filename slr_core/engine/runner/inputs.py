"""The inputs of a forward pass: token embeddings, and latent states of rows that loop or close."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor, nn

from slr_core.engine.runner.packing import group_by_adapter_set, stack_states
from slr_core.engine.scheduler import Work
from slr_core.engine.sequence import Phase, Sequence


def build_inputs(work: Rows[Work], embeddings: nn.Module, table: Tensor) -> Tensor:
    """The inputs ``[m, d]`` of all rows, one row after another.

    Args:
        work: the rows.
        embeddings: the base model's input embeddings.
        table: their weights ``[V, d]``.
    """
    device = table.device
    ids: list[int] = []
    token_places: list[int] = []
    places: dict[Sequence, range] = {}  # of latent inputs
    start = 0
    for row, queries in work:
        tokens = row.tokens()[:queries]
        end = start + queries
        places[row] = range(start, end - len(tokens))
        ids += tokens
        token_places += range(end - len(tokens), end)
        start = end
    embeds: Tensor | None = embeddings(torch.tensor(ids, device=device)) if ids else None
    if embeds is not None and len(token_places) == start:
        return embeds
    inputs = table.new_empty(start, table.shape[1])
    if embeds is not None:
        inputs[torch.tensor(token_places, device=device)] = embeds
    latent = [row for row, _ in work if row.phase in (Phase.LOOP, Phase.CLOSE)]
    for group in group_by_adapter_set(latent):
        for phase, rows in ((p, [row for row in group if row.phase is p]) for p in (Phase.LOOP, Phase.CLOSE)):
            if not rows:
                continue
            u = _loop_inputs(rows) if phase is Phase.LOOP else _closing_inputs(rows)
            latent_places = [place for row in rows for place in places[row]]
            if len(latent_places) < u.shape[0] * u.shape[1]:  # some rows are padded
                u = torch.cat([x[: len(places[row])] for row, x in zip(rows, u, strict=True)])
            u = u.reshape(-1, u.shape[-1])
            if len(latent_places) == start:
                return u
            inputs[torch.tensor(latent_places, device=device)] = u
    return inputs


def remove_position_embeddings(work: Rows[Work], inputs: Tensor, embeddings: nn.Module) -> Tensor:
    """Inputs ``[m, d]`` less what the base will add to them, where states fed back raw hold it already.

    Args:
        work: the rows.
        inputs: from :func:`build_inputs`.
        embeddings: the base's learned embeddings of absolute positions.
    """
    places: list[int] = []
    positions: list[int] = []
    start = 0
    for row, queries in work:
        if row.adapter_set.config.feeds_positions and _iteration(row) > 1:
            places += range(start, start + queries)
            positions += range(row.filled, row.filled + queries)
        start += queries
    if not places:
        return inputs
    added: Tensor = embeddings(torch.tensor(positions, device=inputs.device))
    return inputs.index_add(0, torch.tensor(places, device=inputs.device), added, alpha=-1)


def _iteration(row: Sequence) -> int:
    """The iteration that a row's next pass runs; 0: none."""
    if row.phase is Phase.CLOSE:
        return (row.token.closing_iteration or 0) if row.token is not None else 0
    return row.t + 1 if row.phase is Phase.LOOP else 0


def _loop_inputs(rows: Rows[Sequence]) -> Tensor:
    """``u_t`` ``[n, W, d]`` of the next iteration of rows of one loop adapter set."""
    hidden, _ = stack_states([row.states[-1] for row in rows])
    iterations, changes = [row.t + 1 for row in rows], [row.last_change for row in rows]
    heads = [row.head if row.t else None for row in rows]
    return rows[0].adapter_set.inputs(hidden, _prompt_states(rows), iterations, changes, heads)


def _closing_inputs(rows: Rows[Sequence]) -> Tensor:
    """Inputs ``[n, W, d]`` of the closing pass. A prompt whose loop kept no iteration is run as it is."""
    if rows[0].adapter_set.workspace.per_token:
        again = [row.token.closing_iteration or 0 for row in rows if row.token is not None]
        hidden, _ = stack_states([row.states[max(0, t - 1)] for row, t in zip(rows, again, strict=True)])
        none = [None] * len(rows)
        u = rows[0].adapter_set.inputs(hidden, None, [max(1, t) for t in again], none, none)
        looped = torch.tensor([t > 0 for t in again], device=hidden.device)
        return torch.where(looped[:, None, None], u, hidden)
    hidden, _ = stack_states([_last_state(row) for row in rows])
    projected = rows[0].adapter_set.reasoner.feed_back(hidden, _prompt_states(rows))
    looped = torch.tensor([row.tracker.kept_iterations > 0 for row in rows], device=hidden.device)
    return torch.where(looped[:, None, None], projected, hidden)


def _last_state(row: Sequence) -> Tensor:
    """The state that a loop kept; without one, h_0 without noise."""
    if row.tracker.kept_iterations:
        return row.states[row.tracker.kept_iterations]
    assert row.prompt_state is not None
    return row.adapter_set.workspace.initial_state(row.prompt_state)


def _prompt_states(rows: Rows[Sequence]) -> Tensor | None:
    """The states ``[n, d]`` after the prompts of rows of one loop adapter set, if its feedback reads them."""
    if not rows[0].adapter_set.reasoner.shifted:
        return None
    return torch.stack([row.prompt_state for row in rows if row.prompt_state is not None])
