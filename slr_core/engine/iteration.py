"""One iteration of rows of one loop set, each at its own ``t``: the next states, and what they say of their loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slr_core.engine.passes import stacked
from slr_core.engine.sequence import Sequence
from slr_core.loop.convergence import measure, step
from slr_core.loop.workspace import readout

_OF_THE_STATE = ("norm", "entropy")
"""Measures that need no earlier state."""


@dataclass(frozen=True)
class Iteration:
    """What an iteration came to, for one row: on the host but for the states themselves.

    Attributes:
        sequence: the row; nothing of it has changed yet.
        state: h_t ``[W, d]``.
        measured: entries of :class:`slr_core.loop.convergence.Distances` that are defined.
        finite: whether the whole state is.
        back: |h_t - h_{t-2}| / |h_t - h_{t-1}|, where defined.
        head: the head's log-probabilities ``[V]``, where they are read.
        top_tokens: the likeliest tokens and their probabilities.
    """

    sequence: Sequence
    state: Tensor
    measured: dict[str, float]
    finite: bool
    back: float | None
    head: Tensor | None
    top_tokens: tuple[tuple[str, float], ...]

    def record(self, *, duration_s: float, elapsed_s: float) -> None:
        """Write it into the row's log, which decides whether the loop is over."""
        row, t = self.sequence, self.sequence.t + 1
        row.row.observe(
            t,
            self.measured,
            finite=self.finite,
            back=self.back,
            adapter=row.loops.adapter_name(t),
            duration_s=duration_s,
            elapsed_s=elapsed_s,
            top_tokens=self.top_tokens,
        )


def iterate(rows: list[Sequence], outputs: list[Tensor]) -> list[Iteration]:
    """The third formula and the measures, from each row's g_t ``[W, d]``; one transfer to the host for all of them.

    Args:
        rows: of one loop set; all of them read the head, or none.
        outputs: what the pass gave at their workspaces.
    """
    reasoner = rows[0].loops.reasoner
    g, own = stacked(outputs)
    previous, _ = stacked([row.states[-1] for row in rows])
    # Only a residual to h_0 reads it.
    initial = stacked([row.states[0] for row in rows])[0] if reasoner.residual.config.source == "initial" else previous
    h = reasoner.residual(g, previous, initial)
    moved = reasoner.moved(g, h)
    head = before = None
    if rows[0].reads_head:
        head = reasoner.read(readout(h, own))
        before = torch.stack([_head_before(row, head[i]) for i, row in enumerate(rows)])
    distances = measure(
        h,
        own,
        previous=previous,
        moved=moved,
        head=head,
        head_before=before,
        p_halt=None if reasoner.halting is None else reasoner.halting(h, own),
    )
    measured = {name: x for name, x in vars(distances).items() if x is not None}
    earlier, _ = stacked([row.states[-2] if row.t else row.states[-1] for row in rows])
    change = distances.change
    if change is None or moved is not h:
        change = step(h, previous, own)[0]
    measured["back"] = step(h, earlier, own)[0] / change
    own_states = h if own is None else h.masked_fill(~own[..., None], 0)
    measured["finite"] = own_states.isfinite().flatten(1).all(-1).float()
    table = torch.stack(list(measured.values())).T.tolist()

    count = max(row.request.top_tokens for row in rows)
    tops = None if head is None else reasoner.top_tokens(head, count)
    iterations = []
    for i, row in enumerate(rows):
        values = dict(zip(measured, table[i], strict=True))
        back, finite = values.pop("back"), values.pop("finite")
        t = row.t + 1
        if not reasoner.is_state(t - 1):
            values = {name: value for name, value in values.items() if name in _OF_THE_STATE}
        iterations.append(
            Iteration(
                sequence=row,
                state=h[i, : len(outputs[i])],
                measured=values,
                finite=bool(finite),
                back=back if t > 1 and reasoner.is_state(t - 2) else None,
                head=None if head is None else head[i],
                top_tokens=tops[i][: row.request.top_tokens] if tops else (),
            )
        )
    return iterations


def _head_before(row: Sequence, stand_in: Tensor) -> Tensor:
    if row.head is not None:
        return row.head
    reasoner = row.loops.reasoner
    # Before the first iteration of a loop that starts from a state, that state is read; an input cannot be.
    return reasoner.read(row.states[0][-1]) if reasoner.is_state(0) else stand_in
