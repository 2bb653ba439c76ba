"""One iteration of rows of one loop adapter set, each at its own ``t``: residual and measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from slr_core.engine.runner.packing import stack_states
from slr_core.engine.sequence import Sequence
from slr_core.loop.convergence import measure, measure_step
from slr_core.loop.workspace import readout

_OF_ONE_STATE = ("norm", "entropy", "end_token", "survival")
"""Measures that need no earlier state."""


class IterationOutput(NamedTuple):
    """One row's iteration. All but the tensors is on the host.

    Attributes:
        sequence: the row.
        state: h_t ``[W, d]``.
        measured: entries of :class:`slr_core.loop.convergence.Distances` that are defined.
        finite: whether all values of the state are finite.
        return_ratio: |h_t - h_{t-2}| / |h_t - h_{t-1}|, if it is defined.
        head: log-probabilities ``[V]`` of the LM head, if the row reads them.
        top_tokens: the most likely tokens and their probabilities.
    """

    sequence: Sequence
    state: Tensor
    measured: dict[str, float]
    finite: bool
    return_ratio: float | None
    head: Tensor | None
    top_tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class IterationBatch:
    """Rows of one loop adapter set after the forward pass of an iteration, before it is measured.

    Attributes:
        rows: all of them read the LM head, or none.
        h: h_t ``[n, W, d]``.
        g: the pass's output g_t ``[n, W, d]``.
        previous: h_{t-1} ``[n, W, d]``.
        valid_mask: ``[n, W]`` bool, which positions are valid; ``None``: all.
    """

    rows: list[Sequence]
    h: Tensor
    g: Tensor
    previous: Tensor
    valid_mask: Tensor | None

    @classmethod
    def from_pass(cls, rows: list[Sequence], outputs: list[Tensor]) -> Self:
        """Apply the residual to each row's g_t ``[W, d]``."""
        residual = rows[0].adapter_set.reasoner.residual
        g, valid_mask = stack_states(outputs)
        previous, _ = stack_states([row.states[-1] for row in rows])
        # h_0 is read only if it is the residual's source.
        initial = previous
        if residual.config.source == "initial":
            initial, _ = stack_states([row.states[0] for row in rows])
        return cls(rows, residual(g, previous, initial), g, previous, valid_mask)

    @property
    def reads_head(self) -> bool:
        """Whether :meth:`measure` needs logits."""
        return self.rows[0].reads_head

    def read_states(self) -> Tensor:
        """States ``[n + m, d]`` for the LM head: h_t of all rows, then h_0 of rows that begin, where it is a state."""
        states = torch.cat([readout(self.h, self.valid_mask), *(row.states[0][-1:] for row in self._first_reads())])
        return self.rows[0].adapter_set.reasoner.normed(states)

    def _first_reads(self) -> list[Sequence]:
        return [row for row in self.rows if row.head is None and row.adapter_set.reasoner.is_state(0)]

    def measure(self, logits: Tensor | None) -> list[IterationOutput]:
        """Measure the iteration, with one transfer to the host for all rows.

        Args:
            logits: ``[n + m, V]`` at :meth:`read_states`; ``None`` if the head is not read.
        """
        rows, states, workspace = self.rows, self.h, self.rows[0].adapter_set.workspace
        reasoner = rows[0].adapter_set.reasoner
        valid = states if self.valid_mask is None else states.masked_fill(~self.valid_mask[..., None], 0)
        (h, valid_mask), (g, _), (previous, _) = (
            workspace.measured(x, self.valid_mask) for x in (states, self.g, self.previous)
        )
        compared = reasoner.compared_state(g, h)
        head = head_before = None
        if logits is not None:
            log_probs = logits.float().log_softmax(-1)
            head = log_probs[: len(rows)]
            first = dict(zip(self._first_reads(), log_probs[len(rows) :], strict=True))
            # Rows whose h_0 is an input have no earlier reading; any row is a placeholder, as nothing is compared.
            head_before = torch.stack([row.head if row.head is not None else first.get(row, head[0]) for row in rows])
        distances = measure(
            h,
            valid_mask,
            previous=previous,
            compared=compared,
            head=head,
            head_before=head_before,
            p_halt=None if reasoner.halting is None else reasoner.halting(h, valid_mask),
            survival_before=torch.tensor([row.tracker.survival for row in rows], device=h.device),
            end_token_id=reasoner.config.loop.convergence.end_token_id,
        )
        measured = {name: x for name, x in vars(distances).items() if x is not None}
        earlier, _ = stack_states([row.states[-2] if row.t else row.states[-1] for row in rows])
        earlier, _ = workspace.measured(earlier, self.valid_mask)
        change = distances.change
        if change is None or compared is not h:
            change = measure_step(h, previous, valid_mask)[0]
        measured["return_ratio"] = measure_step(h, earlier, valid_mask)[0] / change
        measured["finite"] = valid.isfinite().flatten(1).all(-1).float()
        table = torch.stack(list(measured.values())).T.tolist()

        tops = None if head is None else reasoner.top_tokens(head, max(row.request.top_tokens for row in rows))
        iterations = []
        for i, row in enumerate(rows):
            values = dict(zip(measured, table[i], strict=True))
            return_ratio, finite = values.pop("return_ratio"), values.pop("finite")
            t = row.t + 1
            if not reasoner.is_state(t - 1):
                values = {name: value for name, value in values.items() if name in _OF_ONE_STATE}
            iterations.append(
                IterationOutput(
                    sequence=row,
                    state=states[i, : row.states[-1].shape[0]],
                    measured=values,
                    finite=bool(finite),
                    return_ratio=return_ratio if t > 1 and reasoner.is_state(t - 2) else None,
                    head=None if head is None else head[i],
                    top_tokens=tops[i][: row.request.top_tokens] if tops else (),
                )
            )
        return iterations
