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
from slr_core.engine.runner.kv_cache import CacheCopies
from slr_core.engine.runner.model_runner import (
    LogitsOutput,
    ModelRunner,
    PassOutput,
    StateOutput,
    StepOutput,
    request_error,
)
from slr_core.engine.scheduler import Plan
from slr_core.engine.sequence import Phase, Sequence, TokenLoops
from slr_core.engine.statistics import EngineCounters
from slr_core.errors import EngineError, SLRError
from slr_core.generation.decoding import TokenLoop, decode_thoughts
from slr_core.generation.reference import count_passes, with_token_loops
from slr_core.loop.convergence import ExitRule
from slr_core.loop.diagnostics import LoopTracker, summarize_loop
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
        except BaseException as error:  # whatever it is, it must reach only this request
            self._fail(sequence, request_error(error))

    def _fail(self, sequence: Sequence, error: SLRError) -> None:
        sequence.settle(error)
        sequence.advance()
        sequence.read_state = None
        self.counters.wasted_iterations += sequence.iterations_run

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
            ids = sequence.request.prompt_ids
            if sequence.token is not None and sequence.prefix_keys:
                copies = self._copies(sequence.token)
                sequence.filled, _ = self.prefixes.restore(sequence.prefix_keys, len(ids), copies, sequence.slot)
                self.counters.reused_tokens += sequence.filled
            self._begin_loop(sequence, self.runner.embed(ids[sequence.filled :]))

    def _copies(self, token: TokenLoops) -> CacheCopies:
        return CacheCopies(self.cache, token.cache_copies, token.cache_size)

    def _apply_state(self, sequence: Sequence, output: StateOutput) -> None:
        sequence.filled += output.queries
        sequence.logits = output.logits
        match sequence.phase:
            case Phase.PREFILL:
                self._apply_prefill(sequence, output)
            case Phase.CLOSE:
                sequence.advance()
                state = output.state
                if sequence.token is not None and sequence.token.closing_iteration:
                    # The pass only wrote keys and values again.
                    state = sequence.states[max(1, sequence.tracker.kept_iterations)][-1]
                self._begin_answer(sequence, state)
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
            self._begin_loop(sequence, self.runner.embed(sequence.request.prompt_ids))

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
        sequence.states.append(output.state)
        t, tracker, token = sequence.t, sequence.tracker, sequence.token
        self.counters.iterations += 1
        if not sequence.adapter_set.in_place:
            sequence.filled += 1
        if tracker.exit_reason is None:
            sequence.head = output.head
            tracker.observe(
                t,
                output.measured,
                finite=output.finite,
                return_ratio=output.return_ratio,
                adapter=sequence.adapter_set.adapter_name(t),
                duration_s=passed.finished_at - passed.started_at,
                elapsed_s=passed.finished_at - sequence.prefilled_at,
                top_tokens=output.top_tokens,
            )
            self.counters.nonfinite += not output.finite
            if token is None or not token.loops:
                sequence.emit(IterationEvent(tracker.records[-1]))
        if token is not None and not token.loops:  # later positions run as many iterations as were kept here
            if tracker.exit_reason == "diverged":
                token.depth = tracker.kept_iterations
            elif not output.finite:
                token.depth = t - 1
        if tracker.exit_reason is None or sequence.goes_on:
            return
        self._end_loop(sequence)
        prefix = passed.answer_prefixes.get(sequence)
        if prefix is not None and sequence.tracker.kept_iterations == t:  # else it read a thought that is not kept
            self._apply_state(sequence, prefix)

    def _end_loop(self, sequence: Sequence) -> None:
        kept_iterations = sequence.tracker.kept_iterations
        if sequence.token is not None:
            self._end_token_loop(sequence, sequence.token)
            return
        sequence.looped_at = time.perf_counter()
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

    def _end_token_loop(self, sequence: Sequence, token: TokenLoops) -> None:
        """End the loop of the prompt, or of a token, and fill the caches that it did not reach."""
        t, kept = sequence.t, sequence.tracker.kept_iterations
        if not token.loops:
            sequence.looped_at = time.perf_counter()
            if not token.shared_cache:  # those of iterations that were not kept may hold values that are not finite
                self.cache.clear(sequence.slot, token.depth * token.cache_size, t * token.cache_size)
        elif not token.shared_cache:
            source, size = max(1, kept), token.cache_size
            first, end = sequence.filled + source * size, sequence.filled + token.depth * size
            self.cache.spread(sequence.slot, sequence.filled + (source - 1) * size, range(first, end, size))
        token.end_loop(sequence.tracker, sequence.states)
        ids = sequence.request.prompt_ids
        if len(token.loops) == 1 and token.depth == sequence.request.loop.max_iterations:
            self.prefixes.save(sequence.prefix_keys, len(ids), self._copies(token), sequence.slot, None)
        if token.closing_iteration == 0 and sequence.filled:  # the base model has not run the prefix
            sequence.filled, sequence.states = 0, [self.runner.embed(ids)]
        if kept and kept == t:
            sequence.logits = sequence.head
        sequence.advance()
        if sequence.phase is Phase.DECODE:
            sequence.filled += len(sequence.states[0])
            self._begin_answer(sequence, sequence.states[max(1, kept)][-1])

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
        self.counters.tokens += len(answer.tokens) > len(sequence.request.forced_ids)
        if sequence.on_event is not None:
            iterations = (
                None if sequence.token is None else len(sequence.tracker.records) if sequence.token.depth else 0
            )
            score = answer.scores[-1] if answer.scores else None
            sequence.emit(TokenEvent(token, answer.new_text(), score, iterations))
        if answer.finish_reason is not None:
            self._finish(sequence)
        elif sequence.token is not None and sequence.token.depth:
            self._begin_token_loop(sequence, sequence.token, token)

    def _begin_token_loop(self, sequence: Sequence, loops: TokenLoops, token: int) -> None:
        """Begin the loop of a token of the answer, in the workspace ``token``."""
        settings, depth = sequence.request.loop, loops.depth
        settings = replace(settings, max_iterations=depth, min_iterations=min(depth, settings.min_iterations))
        sequence.tracker = LoopTracker(ExitRule(settings, sequence.adapter_set.config.guard))
        sequence.states, sequence.head, sequence.pending_tokens = [self.runner.embed([token])], None, []
        sequence.advance()

    def _finish(self, sequence: Sequence) -> None:
        result = build_result(sequence)
        kept = sequence.tracker.kept_iterations
        self.counters.wasted_iterations += (
            sequence.t - kept if sequence.token is None else sequence.token.wasted_iterations
        )
        sequence.emit(FinishedEvent(result))
        sequence.settle(result)
        sequence.advance()


def build_result(sequence: Sequence) -> Result:
    """The result of a request whose answer is complete."""
    request, answer, token = sequence.request, sequence.answer, sequence.token
    tracker, states_of_loop = sequence.tracker, sequence.states
    if token is not None:
        assert token.tracker is not None
        tracker, states_of_loop = token.tracker, token.states
    reasoner, records, reason = sequence.adapter_set.reasoner, tracker.records, tracker.exit_reason
    assert answer.finish_reason is not None
    assert reason is not None
    states = torch.stack(states_of_loop) if request.trace or request.include_states else None
    if states is not None and request.trace:
        (thoughts,) = decode_thoughts(reasoner, [states], [True])
        if any(thought is not None for thought in thoughts):
            records = [replace(r, thought=thought) for r, thought in zip(records, thoughts, strict=True)]
    result = Result(
        text=answer.text,
        token_ids=tuple(answer.tokens),
        finish_reason=answer.finish_reason,
        iterations=len(records),
        exit_reason=reason,
        final_change=records[-1].relative_change if records else None,
        prompt_tokens=len(request.prompt_ids) + len(request.forced_ids),
        forward_passes=count_passes(reasoner, request, len(records), tracker.kept_iterations, len(answer.tokens)),
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
        forced_tokens=len(request.forced_ids),
    )
    if token is None:
        return result
    unlooped = [TokenLoop(0, 0, 0, "max_iterations")] * (len(answer.tokens) - len(token.loops))
    return with_token_loops(reasoner, result, request, token.loops + unlooped, token.depth)
