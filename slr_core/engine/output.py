"""One iteration of rows of one loop set, each at its own ``t``: the next states, and what they say of their loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slr_core.engine.runner.model_runner import stacked
from slr_core.engine.sequence import Sequence
from slr_core.loop.convergence import measure, measure_step
from slr_core.loop.workspace import readout

_OF_THE_STATE = ("norm", "entropy")
"""Measures that need no earlier state."""


@dataclass(frozen=True)
class IterationOutput:
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
    return_ratio: float | None
    head: Tensor | None
    top_tokens: tuple[tuple[str, float], ...]

    def record(self, *, duration_s: float, elapsed_s: float) -> None:
        """Write it into the row's log, which decides whether the loop is over."""
        row, t = self.sequence, self.sequence.t + 1
        row.row.observe(
            t,
            self.measured,
            finite=self.finite,
            return_ratio=self.return_ratio,
            adapter=row.loops.adapter_name(t),
            duration_s=duration_s,
            elapsed_s=elapsed_s,
            top_tokens=self.top_tokens,
        )


@dataclass(frozen=True)
class IterationBatch:
    """Rows of one loop set after an iteration, before it is known what that says of their loops.

    Attributes:
        rows: all of them read the head, or none.
        h: h_t ``[n, W, d]``.
        g: what was mixed into it.
        previous: h_{t-1}.
        own: ``[n, W]`` bool, which positions are real; ``None``: all.
    """

    rows: list[Sequence]
    h: Tensor
    g: Tensor
    previous: Tensor
    valid_mask: Tensor | None

    @classmethod
    def by(cls, rows: list[Sequence], outputs: list[Tensor]) -> Self:
        """The third formula, from each row's g_t ``[W, d]``."""
        residual = rows[0].loops.reasoner.residual
        g, valid_mask = stacked(outputs)
        previous, _ = stacked([row.states[-1] for row in rows])
        # Only a residual to h_0 reads it.
        initial = stacked([row.states[0] for row in rows])[0] if residual.config.source == "initial" else previous
        return cls(rows, residual(g, previous, initial), g, previous, valid_mask)

    @property
    def reads_head(self) -> bool:
        """Whether :meth:`measure` wants the head's view."""
        return self.rows[0].reads_head

    def to_read(self) -> Tensor:
        """States ``[n + m, d]`` for the head: the new ones, then h_0 of rows that begin, where it is a state."""
        return torch.cat([readout(self.h, self.valid_mask), *(row.states[0][-1:] for row in self._begun())])

    def _begun(self) -> list[Sequence]:
        return [row for row in self.rows if row.head is None and row.loops.reasoner.is_state(0)]

    def measure(self, logits: Tensor | None) -> list[IterationOutput]:
        """The measures, with one transfer to the host for all rows; ``logits`` ``[n + m, V]`` at :meth:`to_read`."""
        rows, h, valid_mask, previous = self.rows, self.h, self.valid_mask, self.previous
        reasoner = rows[0].loops.reasoner
        compared = reasoner.compared_state(self.g, h)
        head = before = None
        if logits is not None:
            read = logits.float().log_softmax(-1)
            head, first = read[: len(rows)], dict(zip(self._begun(), read[len(rows) :], strict=True))
            # Where h_0 is an input nothing is compared with it: any row stands in.
            before = torch.stack([row.head if row.head is not None else first.get(row, head[0]) for row in rows])
        distances = measure(
            h,
            valid_mask,
            previous=previous,
            compared=compared,
            head=head,
            head_before=before,
            p_halt=None if reasoner.halting is None else reasoner.halting(h, valid_mask),
        )
        measured = {name: x for name, x in vars(distances).items() if x is not None}
        earlier, _ = stacked([row.states[-2] if row.t else row.states[-1] for row in rows])
        change = distances.change
        if change is None or compared is not h:
            change = measure_step(h, previous, valid_mask)[0]
        measured["back"] = measure_step(h, earlier, valid_mask)[0] / change
        real = h if valid_mask is None else h.masked_fill(~valid_mask[..., None], 0)
        measured["finite"] = real.isfinite().flatten(1).all(-1).float()
        table = torch.stack(list(measured.values())).T.tolist()

        tops = None if head is None else reasoner.top_tokens(head, max(row.request.top_tokens for row in rows))
        iterations = []
        for i, row in enumerate(rows):
            values = dict(zip(measured, table[i], strict=True))
            return_ratio, finite = values.pop("back"), values.pop("finite")
            t = row.t + 1
            if not reasoner.is_state(t - 1):
                values = {name: value for name, value in values.items() if name in _OF_THE_STATE}
            iterations.append(
                IterationOutput(
                    sequence=row,
                    state=h[i, : row.states[-1].shape[0]],
                    measured=values,
                    finite=bool(finite),
                    return_ratio=return_ratio if t > 1 and reasoner.is_state(t - 2) else None,
                    head=None if head is None else head[i],
                    top_tokens=tops[i][: row.request.top_tokens] if tops else (),
                )
            )
        return iterations
