"""The engine without its thread: what one step does to every request that runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slr_core.engine.events import Event, FinishedEvent, IterationEvent, TokenEvent
from slr_core.engine.output import IterationBatch, IterationOutput
from slr_core.engine.prefix_cache import PrefixCache
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.runner.model_runner import ModelRunner, by_length, by_loop_set
from slr_core.engine.scheduler import Scheduler, Work
from slr_core.engine.sequence import Phase, Sequence
from slr_core.engine.statistics import Counters, Step
from slr_core.errors import DeadlineError, EngineError, SLRError
from slr_core.generation.decoding import LatentTextDecoder, decode_thoughts
from slr_core.generation.logprobs import score_states
from slr_core.generation.reference import count_passes
from slr_core.loop.diagnostics import summarize_loop
from slr_core.types import Result, Timings, TokenScore

logger = logging.getLogger(__name__)


class Core:
    """Queue, slots and model; :meth:`step` takes every request one pass forward.

    A fault is kept to the requests that cause it: a pass that fails is run again row by row, and what a row
    raises alone is its own. Nothing here knows of threads.

    Args:
        bank: the base model with all adapters.
        slots: most requests at once.
        capacity: columns of a slot.
        prefix_bytes: memory for prompts that may come again.
        prefill_chunk: most prompt positions in one step.
        static: loop and decode passes run in fixed shapes.
        on_step: hears of every step that ran something; it must not block.
    """

    def __init__(
        self,
        bank: LoraBatch,
        *,
        slots: int,
        capacity: int,
        prefix_bytes: int = 0,
        prefill_chunk: int = 512,
        static: bool = False,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.on_step = on_step
        self.cache = KVCache(bank.model, slots, capacity)
        self.prefixes = PrefixCache(prefix_bytes)
        self.scheduler = Scheduler(
            slots,
            slots * capacity,
            prefill_chunk=prefill_chunk,
            known=lambda sequence: self.prefixes.known(sequence.keys),
            enter=self._enter,
        )
        self.passes = ModelRunner(bank, self.cache, static=static)
        self.head = bank.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.counters = Counters()

    @torch.inference_mode()
    def step(self) -> None:
        """Who is gone leaves, who fits enters, everyone runs one pass, and who then knows its next token writes it."""
        began, before = time.perf_counter(), replace(self.counters)
        self._drop_cancelled()
        work = self.scheduler.schedule()
        for rows in by_length(work, join=self.passes.supports_packing):
            self._run_batch_with_fallback(self._pass, rows)
        written = [(sequence, 0) for sequence in self.scheduler.running if sequence.state is not None]
        if written:
            self._run_batch_with_fallback(self._write, written)
        latent = [sequence for sequence in self.scheduler.running if sequence.phase is Phase.LATENT]
        for group in by_loop_set(latent):
            self._run_batch_with_fallback(self._write_latent, [(sequence, 0) for sequence in group])
        self.counters.steps += bool(work)
        self.counters.row_steps += len(work)
        if self.on_step is not None and work:
            report = self._report(len(work), before, time.perf_counter() - began)
            try:
                self.on_step(report)
            except BaseException:  # whoever keeps statistics must not stop the engine
                logger.exception("a listener failed")
        for sequence in [s for s in self.scheduler.running if s.phase is Phase.DONE]:
            self._leave(sequence)

    @torch.inference_mode()
    def run_idle(self, rows: int, columns: int) -> None:
        """What a step of so many single positions computes, each with another adapter, while no slot is taken."""
        rows, columns = min(rows, self.cache.slots), min(columns, self.cache.capacity)
        self.head(self.passes.run_idle(rows, columns))
        for slot in range(rows):
            self.cache.wipe(slot, 0, columns)

    def _report(self, rows: int, before: Counters, duration_s: float) -> Step:
        now = self.counters
        return Step(
            duration_s=duration_s,
            rows=rows,
            looping=now.iterations - before.iterations,
            prefill_tokens=now.prefill_tokens - before.prefill_tokens,
            written=now.tokens - before.tokens,
            columns=sum(sequence.filled for sequence in self.scheduler.running),
        )

    def refuse_waiting(self, error: Exception) -> None:
        """Tell everyone who waits that nothing will come."""
        for sequence in list(self.scheduler.waiting):
            _settle(sequence, error)
            self.scheduler.release(sequence)

    def abort(self, error: Exception) -> None:
        """Tell everyone who waits or runs that nothing will come, without touching the model's memory."""
        self.refuse_waiting(error)
        for sequence in list(self.scheduler.running):
            _settle(sequence, error)
            self.scheduler.release(sequence)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    # -- coming and going ---------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            if not sequence.cancelled and now <= sequence.deadline:
                continue
            # Who has cancelled hears of that: `concurrent.futures.wait` waits until somebody says so.
            _settle(sequence, DeadlineError("the request's deadline has passed"))
            self.counters.wasted_iterations += sequence.t
            self._leave(sequence)

    def _enter(self, sequence: Sequence) -> None:
        sequence.admitted = time.perf_counter()
        self._run_row(sequence, self._start)

    def _start(self, sequence: Sequence) -> None:
        workspace, ids = sequence.loops.workspace, sequence.request.prompt_ids
        if workspace.prefills:
            filled, state = self.prefixes.restore(sequence.keys, len(ids), self.cache, sequence.slot)
            self.counters.reused_tokens += filled
            sequence.filled = filled
            if state is not None:
                self._begin(sequence, state)
        elif not sequence.request.score_prompt:
            self._begin(sequence, self._embedded(sequence))

    def _leave(self, sequence: Sequence) -> None:
        slot = sequence.slot
        moved = self.scheduler.release(sequence)
        if slot < 0:
            return
        # A slot without a request is all zeros.
        self.cache.wipe(slot, 0, sequence.reserved)
        if moved is not None:
            last = len(self.scheduler.running)
            self.cache.move(last, slot, moved.reserved)
            self.cache.wipe(last, 0, moved.reserved)

    def _run_batch_with_fallback(self, run: Callable[[list[Work]], None], rows: list[Work]) -> None:
        try:
            run(rows)
            return
        except Exception as error:  # whatever it is, its requests must hear of it and the engine must go on
            if len(rows) == 1:
                self._fail(rows[0][0], error)
                return
            logger.warning("a pass of %d requests failed (%s), running each alone", len(rows), repr(error))
        # Not while the fault is handled: it holds all tensors of the pass, and may be that there was no room for more.
        for row in rows:
            self._run_batch_with_fallback(run, [row])

    def _run_row(self, sequence: Sequence, run: Callable[..., None], *arguments: Any) -> None:
        try:
            run(sequence, *arguments)
        except Exception as error:  # as above
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        logger.error("a request failed", exc_info=error)
        _settle(sequence, error if isinstance(error, SLRError) else EngineError(f"the request failed: {error}"))
        sequence.phase, sequence.state = Phase.DONE, None
        self.counters.wasted_iterations += sequence.t

    # -- a pass ------------------------------------------------------------------------------------

    def _pass(self, rows: list[Work]) -> None:
        began = time.perf_counter()
        outputs = dict(zip((sequence for sequence, _ in rows), self.passes.run(rows), strict=True))
        looping = by_loop_set(sequence for sequence, _ in rows if sequence.phase is Phase.LOOP)
        moved = [IterationBatch.by(group, [outputs[sequence] for sequence in group]) for group in looping]
        # The head's weights are large: what loops is read together with what writes, where anything in a loop is read.
        reading = [group for group in moved if group.reads_head]
        writing = [sequence for sequence, _ in rows if sequence.phase is Phase.DECODE] if reading else []
        states = [*(group.to_read() for group in reading), *(outputs[sequence][-1:] for sequence in writing)]
        read = list(self.head(torch.cat(states)).split([len(x) for x in states])) if reading else []
        logits = dict(zip(writing, (x[0] for x in read[len(reading) :]), strict=True))
        iterations = [
            iteration for group in moved for iteration in group.measure(read.pop(0) if group.reads_head else None)
        ]
        prefilled = [row for row, count in rows if row.phase is Phase.PREFILL and count == row.queries()]
        whole = torch.stack([outputs[row][-1] for row in prefilled]).isfinite().all(-1).tolist() if prefilled else []
        finite = {row for row, is_finite in zip(prefilled, whole, strict=True) if is_finite}
        # Nothing has changed so far: what failed can be run again. From here on a fault is one row's alone.
        ended = time.perf_counter()
        for iteration in iterations:
            self._run_row(iteration.sequence, self._iterated, iteration, began, ended)
        looped = {iteration.sequence for iteration in iterations}
        for sequence, count in rows:
            if sequence not in looped:
                sequence.logits = logits.get(sequence)
                self._run_row(sequence, self._ran, count, outputs[sequence], sequence in finite)

    def _ran(self, sequence: Sequence, count: int, states: Tensor, finite: bool) -> None:
        if sequence.phase is Phase.PREFILL and sequence.request.score_prompt:
            self._score_prompt(sequence, states[:count])
        sequence.filled += count
        state = states[count - 1]
        if sequence.phase is Phase.PREFILL:
            self.counters.prefill_tokens += count
            if not sequence.queries():
                if finite:  # a fault that passes must not stay for who comes with the same prompt
                    self.prefixes.keep(sequence.keys, sequence.filled, self.cache, sequence.slot, state)
                if sequence.loops.workspace.prefills:
                    self._begin(sequence, state)
                else:  # it was run for its scores alone
                    sequence.filled = 0
                    self._begin(sequence, self._embedded(sequence))
        elif sequence.phase is Phase.CLOSE:
            self._answer(sequence, state)
        else:
            sequence.state = state

    def _score_prompt(self, sequence: Sequence, states: Tensor) -> None:
        ids, at = sequence.request.prompt_ids, sequence.filled + 1
        if not sequence.prompt_scores:
            sequence.prompt_scores.append(TokenScore(ids[0], None))
        following = ids[at : at + len(states)]
        sequence.prompt_scores += score_states(self.head, states, following, sequence.request.logprobs or 0)

    def _embedded(self, sequence: Sequence) -> Tensor:
        embedded: Tensor = self.passes.embeddings(torch.tensor(sequence.request.prompt_ids, device=self.passes.device))
        return embedded

    def _begin(self, sequence: Sequence, state: Tensor) -> None:
        """The prompt is there: ``state`` is what :meth:`Workspace.first` asks for."""
        sequence.prefilled = time.perf_counter()
        sequence.prompt_state = state
        sequence.states = [sequence.loops.workspace.initial_state(state)]
        sequence.phase = Phase.LOOP
        if sequence.row.exit_reason is not None:
            self._exit(sequence)

    def _iterated(self, sequence: Sequence, iteration: IterationOutput, began: float, ended: float) -> None:
        sequence.states.append(iteration.state)
        sequence.head = iteration.head
        iteration.record(duration_s=ended - began, elapsed_s=ended - sequence.prefilled)
        self.counters.iterations += 1
        if not sequence.loops.in_place:
            sequence.filled += 1
        _tell(sequence, IterationEvent(sequence.row.records[-1]))
        if sequence.row.exit_reason is not None:
            self._exit(sequence)

    def _exit(self, sequence: Sequence) -> None:
        """The loop is over: what it left behind that does not count is forgotten."""
        sequence.looped = time.perf_counter()
        kept, workspace = sequence.row.kept_iterations, sequence.loops.workspace
        if not sequence.loops.in_place:
            sequence.filled = len(sequence.request.prompt_ids) + kept
        if sequence.row.exit_reason == "diverged":
            self.cache.wipe(sequence.slot, sequence.filled, sequence.reserved)
        if kept and sequence.loops.reasoner.answers_from_states:
            sequence.phase = Phase.LATENT
        elif workspace.closing_passes(kept):
            sequence.phase = Phase.CLOSE
        else:
            if kept and kept == sequence.t:
                sequence.logits = sequence.head
            self._answer(sequence, sequence.states[kept][-1] if kept else sequence.prompt_state)

    def _answer(self, sequence: Sequence, state: Tensor | None) -> None:
        sequence.phase = Phase.DECODE
        prefix = sequence.request.answer_prefix_ids
        sequence.pending, sequence.state = list(prefix), None if prefix else state

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, rows: list[Work]) -> None:
        unread = [s for s, _ in rows if s.logits is None and s.state is not None]
        if unread:
            logits = self.head(torch.stack([s.state for s in unread if s.state is not None]))
            for sequence, own in zip(unread, logits, strict=True):
                sequence.logits = own
        self._take([s for s, _ in rows], torch.stack([s.logits for s, _ in rows if s.logits is not None]))

    def _write_latent(self, rows: list[Work]) -> None:
        sequences = [sequence for sequence, _ in rows]
        memories = [s.loops.workspace.memory(torch.stack(s.states), s.row.kept_iterations) for s in sequences]
        writer = LatentTextDecoder(
            sequences[0].loops.reasoner, memories, [s.request.answer_prefix_ids for s in sequences]
        )
        everyone = torch.ones(len(sequences), dtype=torch.bool, device=memories[0].device)
        self._take(sequences, writer.next([s.answer.tokens for s in sequences], everyone))

    def _take(self, sequences: list[Sequence], logits: Tensor) -> None:
        table = torch.stack([logits.argmax(-1), logits.isnan().any(-1)], dim=-1).tolist()
        if any(s.answer.generator is not None or s.request.logprobs is not None for s in sequences):
            logits = logits.cpu()  # at once, and not row by row
        for sequence, (likeliest, broken), row in zip(sequences, table, logits, strict=True):
            if broken:  # its most likely token would be no more than the first
                self._fail(sequence, EngineError("the model's logits are not finite"))
            else:
                self._run_row(sequence, self._push, likeliest, row)

    def _push(self, sequence: Sequence, likeliest: int, logits: Tensor) -> None:
        answer = sequence.answer
        token = answer.choose_token(logits, likeliest)
        sequence.state, sequence.logits, sequence.pending = None, None, [token]
        self.counters.tokens += 1
        if sequence.on_event is not None:
            _tell(sequence, TokenEvent(token, answer.new_text(), answer.scores[-1] if answer.scores else None))
        if answer.finish_reason is not None:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        request, row, answer = sequence.request, sequence.row, sequence.answer
        reasoner, records, reason = sequence.loops.reasoner, row.records, row.exit_reason
        assert answer.finish_reason is not None
        assert reason is not None
        states = torch.stack(sequence.states) if request.trace or request.include_states else None
        if states is not None and request.trace:
            (thoughts,) = decode_thoughts(reasoner, [states], [True])
            if any(said is not None for said in thoughts):
                records = [replace(r, thought=said) for r, said in zip(records, thoughts, strict=True)]
        result = Result(
            text=answer.text,
            token_ids=tuple(answer.tokens),
            finish_reason=answer.finish_reason,
            iterations=sequence.t,
            exit_reason=reason,
            final_change=records[-1].relative_change if records else None,
            prompt_tokens=len(request.prompt_ids),
            forward_passes=count_passes(reasoner, request, sequence.t, row.kept_iterations, len(answer.tokens)),
            timings=Timings(
                queue_s=sequence.admitted - sequence.arrived,
                prefill_s=sequence.prefilled - sequence.admitted,
                loop_s=sequence.looped - sequence.prefilled,
                decode_s=answer.finished_at - sequence.looped,
                total_s=answer.finished_at - sequence.arrived,
            ),
            first_token_s=answer.first_token_at - sequence.arrived,
            records=tuple(records),
            stability=summarize_loop(records, row.return_ratios, reason == "converged"),
            states=states.float().cpu() if states is not None and request.include_states else None,
            scores=tuple(answer.scores),
            prompt_scores=tuple(sequence.prompt_scores),
        )
        sequence.phase = Phase.DONE
        self.counters.wasted_iterations += sequence.t - row.kept_iterations
        _tell(sequence, FinishedEvent(result))
        _settle(sequence, result)


def _tell(sequence: Sequence, event: Event) -> None:
    if sequence.on_event is None:
        return
    try:
        sequence.on_event(event)
    except BaseException:  # a listener's fault is not the request's, and must not stop the step
        logger.exception("a listener failed")


def _settle(sequence: Sequence, outcome: Result | Exception) -> None:
    if sequence.settled:
        return  # a fault that comes after the answer
    sequence.settled = True
    if sequence.future.set_running_or_notify_cancel():
        settle: Any = sequence.future.set_exception if isinstance(outcome, Exception) else sequence.future.set_result
        settle(outcome)
