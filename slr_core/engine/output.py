"""Applies the output of a step to its requests: iterations, exits, tokens, events and results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slr_core.engine.events import FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.prefix_cache import PrefixCache
from slr_core.engine.runner.iteration import IterationOutput
from slr_core.engine.runner.model_runner import (
    LogitsOutput,
    ModelRunner,
    PassOutput,
    StateOutput,
    StepOutput,
    request_error,
)
from slr_core.engine.scheduler import Plan
from slr_core.engine.sequence import Phase, Sequence
from slr_core.engine.statistics import EngineCounters
from slr_core.errors import EngineError, SLRError
from slr_core.generation.decoding import decode_thoughts
from slr_core.generation.reference import count_passes
from slr_core.loop.diagnostics import summarize_loop
from slr_core.loop.noise import perturb_start
from slr_core.types import Result, Timings


class OutputProcessor:
    """Applies what the runner has computed. Everything here changes one request at a time, and fails for it alone.

    Args:
        runner: reads the logits of next tokens.
        prefixes: gets the prefixes of finished prompts.
        counters: are counted up.
    """

    def __init__(self, runner: ModelRunner, prefixes: PrefixCache, counters: EngineCounters) -> None:
        self.runner, self.cache = runner, runner.cache
        self.prefixes, self.counters = prefixes, counters

    def process(self, output: StepOutput) -> None:
        """Apply the passes of a step, then choose the next tokens."""
        for sequence, error in output.failures:
            self._fail(sequence, error)
        for passed in output.passes:
            for iteration in passed.iterations:
                self._run_row(self._apply_iteration, iteration.sequence, iteration, passed)
            for state in passed.states:
                self._run_row(self._apply_state, state.sequence, state)
        self._choose_tokens(output.plan)

    def _run_row(self, run: Callable[..., None], sequence: Sequence, *arguments: Any) -> None:
        try:
            run(sequence, *arguments)
        except Exception as error:  # whatever it is, it must reach only this request
            self._fail(sequence, request_error(error))

    def _fail(self, sequence: Sequence, error: SLRError) -> None:
        sequence.settle(error)
        sequence.advance()
        sequence.read_state = None
        self.counters.wasted_iterations += sequence.t

    # -- the prompt --------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """Start a request that has just got its slot: with a cached prefix, its prefill begins further on."""
        sequence.admitted_at = time.perf_counter()
        self._run_row(self._start, sequence)

    def _start(self, sequence: Sequence) -> None:
        if sequence.adapter_set.workspace.prefills:
            keys, tokens = sequence.prefix_keys, len(sequence.request.prompt_ids)
            sequence.filled, state = self.prefixes.restore(keys, tokens, self.cache, sequence.slot)
            self.counters.reused_tokens += sequence.filled
            if state is not None:
                self._begin_loop(sequence, state)
        elif not sequence.request.score_prompt:
            self._begin_loop(sequence, self.runner.embed_prompt(sequence))

    def _apply_state(self, sequence: Sequence, output: StateOutput) -> None:
        sequence.filled += output.queries
        sequence.logits = output.logits
        match sequence.phase:
            case Phase.PREFILL:
                self._apply_prefill(sequence, output)
            case Phase.CLOSE:
                sequence.advance()
                self._begin_answer(sequence, output.state)
            case _:
                sequence.read_state = output.state

    def _apply_prefill(self, sequence: Sequence, output: StateOutput) -> None:
        self.counters.prefill_tokens += output.queries
        sequence.prompt_scores += output.prompt_scores
        if sequence.queries():
            return
        if output.finite:  # a passing fault must not be kept for later requests with this prompt
            self.prefixes.save(sequence.prefix_keys, sequence.filled, self.cache, sequence.slot, output.state)
        if sequence.adapter_set.workspace.prefills:
            self._begin_loop(sequence, output.state)
        else:  # the prompt was run only for its scores
            sequence.filled = 0
            self._begin_loop(sequence, self.runner.embed_prompt(sequence))

    # -- the loop ----------------------------------------------------------------------------------

    def _begin_loop(self, sequence: Sequence, prompt_state: Tensor) -> None:
        """Begin the loop; ``prompt_state`` is the argument of :meth:`Workspace.initial_state`."""
        sequence.prefilled_at = time.perf_counter()
        sequence.prompt_state = prompt_state
        initial = sequence.adapter_set.workspace.initial_state(prompt_state)
        sequence.states = [perturb_start(initial, sequence.request.loop)]
        sequence.advance()
        if sequence.tracker.exit_reason is not None:
            self._end_loop(sequence)

    def _apply_iteration(self, sequence: Sequence, output: IterationOutput, passed: PassOutput) -> None:
        t = sequence.t + 1
        sequence.states.append(output.state)
        sequence.head = output.head
        sequence.tracker.observe(
            t,
            output.measured,
            finite=output.finite,
            return_ratio=output.return_ratio,
            adapter=sequence.adapter_set.adapter_name(t),
            duration_s=passed.finished_at - passed.started_at,
            elapsed_s=passed.finished_at - sequence.prefilled_at,
            top_tokens=output.top_tokens,
        )
        self.counters.iterations += 1
        if not sequence.adapter_set.in_place:
            sequence.filled += 1
        sequence.emit(IterationEvent(sequence.tracker.records[-1]))
        if sequence.tracker.exit_reason is None:
            return
        self._end_loop(sequence)
        prefix = passed.answer_prefixes.get(sequence)
        if prefix is not None and sequence.tracker.kept_iterations == t:  # else it read a thought that is not kept
            self._apply_state(sequence, prefix)

    def _end_loop(self, sequence: Sequence) -> None:
        sequence.looped_at = time.perf_counter()
        kept_iterations = sequence.tracker.kept_iterations
        if not sequence.adapter_set.in_place:
            sequence.filled = len(sequence.request.prompt_ids) + kept_iterations
        if sequence.tracker.exit_reason == "diverged":
            self.cache.clear(sequence.slot, sequence.filled, sequence.reserved)
        sequence.advance()
        if sequence.phase is Phase.DECODE:
            if kept_iterations and kept_iterations == sequence.t:
                sequence.logits = sequence.head
            state = sequence.states[kept_iterations][-1] if kept_iterations else sequence.prompt_state
            self._begin_answer(sequence, state)

    # -- the answer --------------------------------------------------------------------------------

    def _begin_answer(self, sequence: Sequence, state: Tensor | None) -> None:
        """Read the first token at ``state`` ``[d]``, or after the answer prefix."""
        prefix = sequence.request.answer_prefix_ids
        sequence.pending_tokens, sequence.read_state = list(prefix), None if prefix else state

    def _choose_tokens(self, plan: Plan) -> None:
        for read, rows in (
            (self.runner.read_logits, [row for row in plan if row.sequence.read_state is not None]),
            (self.runner.read_latent_logits, [row for row in plan if row.sequence.phase is Phase.LATENT]),
        ):
            outputs, failures = read(rows)
            for sequence, error in failures:
                self._fail(sequence, error)
            for output in outputs:
                self._apply_logits(output)

    def _apply_logits(self, output: LogitsOutput) -> None:
        for sequence, logits, most_likely, valid in zip(*output, strict=True):
            if valid:
                self._run_row(self._choose_token, sequence, logits, most_likely)
            else:
                self._fail(sequence, request_error(EngineError("the model's logits are not finite")))

    def _choose_token(self, sequence: Sequence, logits: Tensor, most_likely: int) -> None:
        answer = sequence.answer
        token = answer.choose_token(logits, most_likely)
        sequence.read_state, sequence.logits, sequence.pending_tokens = None, None, [token]
        self.counters.tokens += 1
        if sequence.on_event is not None:
            sequence.emit(TokenEvent(token, answer.new_text(), answer.scores[-1] if answer.scores else None))
        if answer.finish_reason is not None:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        result = build_result(sequence)
        self.counters.wasted_iterations += sequence.t - sequence.tracker.kept_iterations
        sequence.emit(FinishedEvent(result))
        sequence.settle(result)
        sequence.advance()


def build_result(sequence: Sequence) -> Result:
    """The result of a request whose answer is complete."""
    request, tracker, answer = sequence.request, sequence.tracker, sequence.answer
    reasoner, records, reason = sequence.adapter_set.reasoner, tracker.records, tracker.exit_reason
    assert answer.finish_reason is not None
    assert reason is not None
    states = torch.stack(sequence.states) if request.trace or request.include_states else None
    if states is not None and request.trace:
        (thoughts,) = decode_thoughts(reasoner, [states], [True])
        if any(thought is not None for thought in thoughts):
            records = [replace(r, thought=thought) for r, thought in zip(records, thoughts, strict=True)]
    return Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finish_reason,
        iterations=sequence.t,
        exit_reason=reason,
        final_change=records[-1].relative_change if records else None,
        prompt_tokens=len(request.prompt_ids),
        forward_passes=count_passes(reasoner, request, sequence.t, tracker.kept_iterations, len(answer.tokens)),
        timings=Timings(
            queue_s=sequence.admitted_at - sequence.arrived_at,
            prefill_s=sequence.prefilled_at - sequence.admitted_at,
            loop_s=sequence.looped_at - sequence.prefilled_at,
            decode_s=answer.finished_at - sequence.looped_at,
            total_s=answer.finished_at - sequence.arrived_at,
        ),
        first_token_s=answer.first_token_at - sequence.arrived_at,
        records=tuple(records),
        stability=summarize_loop(records, tracker.return_ratios, reason == "converged"),
        states=states.float().cpu() if states is not None and request.include_states else None,
        scores=tuple(answer.scores),
        prompt_scores=tuple(sequence.prompt_scores),
    )
