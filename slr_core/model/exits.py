"""The loop of the reference with its exits: every row stops by its own criterion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slr_core.errors import RequestError
from slr_core.loop.context import Context
from slr_core.loop.convergence import ExitRule, measure, measure_step
from slr_core.loop.diagnostics import LoopTracker, observe, summarize_loop
from slr_core.loop.noise import perturb_start
from slr_core.loop.workspace import readout
from slr_core.model.looped import LoopedModel
from slr_core.params import ResolvedLoopParams
from slr_core.types import ExitReason, IterationRecord, Stability


@dataclass
class LoopOutput:
    """A finished loop; every list has one entry per row.

    Attributes:
        context: ready for the answer: each row sees its prompt and the thoughts that its own loop kept.
        states: h_0 ... h_t, ``[t + 1, W, d]`` with t the iterations of the row and W its valid workspace positions.
        iterations: iterations run.
        kept_iterations: iterations whose result is decoded; below ``iterations`` only after a divergence.
        exit_reasons: why the loop ended.
        records: one per iteration.
        iterations_run: iterations run, with those after the exit that the prompt's positions run in the workspace
            ``token``.
        stability: summary of the records.
        durations_s: seconds from the loop's start to the row's exit.
    """

    context: Context
    states: list[Tensor]
    iterations: list[int]
    kept_iterations: list[int]
    exit_reasons: list[ExitReason]
    records: list[list[IterationRecord]]
    iterations_run: list[int]
    stability: list[Stability]
    durations_s: list[float]


def loop_until_exit(
    reasoner: LoopedModel,
    context: Context,
    params: Sequence[ResolvedLoopParams],
    *,
    top_tokens: int = 0,
    read_head: bool = False,
) -> LoopOutput:
    """Iterate until every row has met its own exit; rows stop at different iterations.

    In the workspace ``token``, this is the loop of the prompt, or of one token of each row's answer. The prompt's
    positions go on to the last iteration after the exit, which decides where the first token is read. If a state of
    the prompt is not finite or the loop diverges, later positions run no more iterations than were kept here.

    Args:
        reasoner: the model.
        context: from :meth:`LoopedModel.encode`; changed in place.
        params: one per row.
        top_tokens: number of most likely tokens to record per iteration; implies ``read_head``.
        read_head: record the measures of the LM head for every row, whatever its criterion.

    Raises:
        RequestError: the number of ``params`` is not the number of rows.
    """
    if len(params) != len(context.hidden):
        raise RequestError(f"expected loop parameters for {len(context.hidden)} rows, got {len(params)}")
    read_head = read_head or top_tokens > 0 or any(row.reads_head for row in params)
    workspace, valid_mask = reasoner.workspace, context.valid_mask
    full_depth = workspace.per_token and context.depths is None
    depths, iterations_run = [row.max_iterations for row in params], [0] * len(params)
    rows = [LoopTracker(ExitRule(row, reasoner.config.loop.guard)) for row in params]
    clean = workspace.measured(context.hidden, valid_mask)[0]
    _perturb(context, params)
    states = [workspace.measured(context.hidden, valid_mask)[0]]
    head = reasoner.log_probs(readout(context.hidden, valid_mask)) if read_head and reasoner.is_state(0) else None
    survival: Tensor | None = None
    started, t = time.perf_counter(), 0
    while any(
        active := [row.exit_reason is None or (full_depth and t < n) for row, n in zip(rows, depths, strict=True)]
    ):
        t += 1
        iteration_started = time.perf_counter()
        g, h = reasoner.iterate(context, t, torch.tensor(active, device=reasoner.device))
        finite = h.masked_fill(~valid_mask[..., None], 0).isfinite().flatten(1).all(-1)
        head_before, head = head, reasoner.log_probs(readout(h, valid_mask)) if read_head else None
        (g, _), (h, measured) = workspace.measured(g, valid_mask), workspace.measured(h, valid_mask)
        states.append(h)
        distances = measure(
            h,
            measured,
            previous=states[-2] if reasoner.is_state(t - 1) else None,
            compared=reasoner.compared_state(g, h),
            head=head,
            head_before=head_before,
            p_halt=None if reasoner.halting is None else reasoner.halting(h, measured),
            survival_before=survival,
            end_token_id=reasoner.config.loop.convergence.end_token_id,
        )
        survival = distances.survival
        return_ratio = None
        if t > 1 and reasoner.is_state(t - 2):
            return_ratio = measure_step(h, states[-3], measured)[0] / measure_step(h, states[-2], measured)[0]
        tops = reasoner.top_tokens(head, top_tokens) if head is not None else None
        now = time.perf_counter()
        observe(
            rows,
            t,
            distances,
            finite=finite,
            return_ratio=return_ratio,
            tops=tops,
            adapter=reasoner.adapter_name(t),
            duration_s=now - iteration_started,
            elapsed_s=now - started,
        )
        for i in (i for i, runs in enumerate(active) if runs):
            iterations_run[i] = t
            if rows[i].exit_reason == "diverged":
                depths[i] = rows[i].kept_iterations
            elif not finite[i]:  # after the exit
                depths[i] = t - 1
    if full_depth:
        context.depths = torch.tensor(depths, device=reasoner.device)
    return _finish(reasoner, context, rows, torch.stack(states, dim=1), clean, iterations_run)


def _perturb(context: Context, params: Sequence[ResolvedLoopParams]) -> None:
    """Add the noise that rows request to h_0."""
    if not any(row.noise_scale for row in params):
        return
    hidden = context.hidden.clone()
    for i, row in enumerate(params):
        valid_mask = context.valid_mask[i]
        hidden[i, valid_mask] = perturb_start(hidden[i, valid_mask], row)
    context.initial = context.hidden = hidden


def _finish(
    reasoner: LoopedModel,
    context: Context,
    rows: list[LoopTracker],
    states: Tensor,
    clean: Tensor,
    iterations_run: list[int],
) -> LoopOutput:
    valid_mask = reasoner.workspace.measured(context.hidden, context.valid_mask)[1]
    kept_iterations = torch.tensor([row.kept_iterations for row in rows], device=states.device)
    if not (reasoner.answers_from_states and all(kept_iterations)):
        # A loop that kept no iteration is the base model, whatever noise it started from.
        reasoner.close(context, torch.cat([clean[:, None], states[:, 1:]], dim=1), kept_iterations)
    for layer, keys, values in context.layers():
        # A masked NaN still poisons attention: 0 * NaN is NaN.
        if not (keys.isfinite().all() and values.isfinite().all()):
            layer.keys = torch.nan_to_num(keys, 0.0, 0.0, 0.0)
            layer.values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
    iterations = [len(row.records) for row in rows]
    reasons: list[ExitReason] = [row.exit_reason or "max_iterations" for row in rows]
    return LoopOutput(
        context=context,
        states=[
            states[i, : n + 1, slice(None) if valid_mask is None else valid_mask[i]] for i, n in enumerate(iterations)
        ],
        iterations=iterations,
        kept_iterations=[row.kept_iterations for row in rows],
        exit_reasons=reasons,
        records=[row.records for row in rows],
        iterations_run=iterations_run,
        stability=[
            summarize_loop(row.records, row.return_ratios, reason == "converged")
            for row, reason in zip(rows, reasons, strict=True)
        ],
        durations_s=[row.elapsed_s for row in rows],
    )
