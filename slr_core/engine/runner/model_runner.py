"""Everything that a step computes: forward passes, iterations, and logits of next tokens.

An immutable plan goes in and an immutable output comes back. The runner reads sequences and writes cache positions
beyond what they have filled, so everything here can be repeated until :mod:`slr_core.engine.output` applies it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from slr_core.engine.runner.attention import enable_packing
from slr_core.engine.runner.fixed_shapes import FixedShapeRunner
from slr_core.engine.runner.inputs import build_inputs, remove_position_embeddings
from slr_core.engine.runner.iteration import IterationBatch, IterationOutput
from slr_core.engine.runner.kv_cache import KVCache
from slr_core.engine.runner.linear import packed_head
from slr_core.engine.runner.lora_batch import LoraBatch
from slr_core.engine.runner.packing import group_by_adapter_set, length_class, pack, read_width, split_into_passes
from slr_core.engine.scheduler import Plan, Work
from slr_core.engine.sequence import Phase, Sequence
from slr_core.errors import EngineError, SLRError
from slr_core.generation.decoding import LatentTextDecoder
from slr_core.generation.logprobs import score_states
from slr_core.model.base_support import attention_mask, find_final_norm, find_position_embeddings, keep_input
from slr_core.types import TokenScore

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StateOutput(NamedTuple):
    """One row's pass that was no iteration.

    Attributes:
        sequence: the row.
        queries: positions that were run.
        state: the state ``[d]`` at the last of them.
        finite: whether all values of ``state`` are finite; checked only at the end of a prompt.
        logits: logits ``[V]`` at ``state``, if the pass read them.
        prompt_scores: scores of the prompt's tokens that these positions predict, if the request asks for them.
    """

    sequence: Sequence
    queries: int
    state: Tensor
    finite: bool
    logits: Tensor | None
    prompt_scores: list[TokenScore]


class PassOutput(NamedTuple):
    """One forward pass.

    Attributes:
        started_at: ``time.perf_counter`` at its start.
        finished_at: the same, at its end.
        iterations: its rows that ran an iteration.
        states: its other rows.
        answer_prefixes: of rows that ran the answer prefix in the same pass as their last thought.
    """

    started_at: float
    finished_at: float
    iterations: list[IterationOutput]
    states: list[StateOutput]
    answer_prefixes: dict[Sequence, StateOutput]


class RowFailure(NamedTuple):
    """A row whose computation raised an error, also when it was run alone."""

    sequence: Sequence
    error: SLRError


class StepOutput(NamedTuple):
    """The forward passes of a step.

    Attributes:
        plan: what was to run.
        passes: one or more, and more where a pass failed and its rows were run alone.
        failures: rows that failed.
    """

    plan: Plan
    passes: list[PassOutput]
    failures: list[RowFailure]


class LogitsOutput(NamedTuple):
    """Logits of next tokens.

    Attributes:
        sequences: the rows.
        logits: ``[n, V]``, up to a constant each; on the CPU if a row samples or scores.
        most_likely: the index of each row's largest logit.
        valid: whether a row's logits hold no NaN.
    """

    sequences: list[Sequence]
    logits: Tensor
    most_likely: list[int]
    valid: list[bool]


class ModelRunner:
    """Runs the base model over the slots.

    Args:
        lora_batch: the base model with all adapters.
        cache: the slots.
        static_shapes: run single positions in fixed shapes, see :mod:`slr_core.engine.runner.fixed_shapes`.
    """

    def __init__(self, lora_batch: LoraBatch, cache: KVCache, *, static_shapes: bool) -> None:
        self.fixed_shapes = FixedShapeRunner(lora_batch, cache) if static_shapes else None
        self.packing = not static_shapes and enable_packing(lora_batch.model)
        """Whether rows of different length classes can share a pass."""
        self.lora_batch, self.cache = lora_batch, cache
        self.model, self.device = lora_batch.model, lora_batch.model.device
        self.head = packed_head(self.model)
        self.embeddings: nn.Module = self.model.get_input_embeddings()
        self.position_embeddings = find_position_embeddings(self.model)
        table = self.embeddings.weight
        assert isinstance(table, Tensor)
        self.table = table

    # -- the forward passes of a step --------------------------------------------------------------

    def execute(self, plan: Plan) -> StepOutput:
        """Run the forward passes of a step, with row-by-row fallback."""
        passes: list[PassOutput] = []
        failures: list[RowFailure] = []
        for rows in split_into_passes(plan, packing=self.packing):
            self._run_batch_with_fallback(self._run_pass, rows, passes, failures)
        return StepOutput(plan, passes, failures)

    def _run_batch_with_fallback(
        self, run: Callable[[list[Work]], T], rows: list[Work], outputs: list[T], failures: list[RowFailure]
    ) -> None:
        """Append the output of ``run(rows)``; if it raises, run each row alone, and append those that fail alone."""
        try:
            outputs.append(run(rows))
            return
        except BaseException as error:  # whatever it is, it must reach only the requests that cause it
            if len(rows) == 1:
                failures.append(RowFailure(rows[0].sequence, request_error(error)))
                return
            logger.warning("A pass of %d requests failed (%s), running each alone", len(rows), repr(error))
        # After the handler: the error keeps all tensors of the pass alive, and memory may be what it lacked.
        for row in rows:
            self._run_batch_with_fallback(run, [row], outputs, failures)

    def _run_pass(self, rows: list[Work]) -> PassOutput:
        started_at = time.perf_counter()
        states = dict(zip((row.sequence for row in rows), self.forward(rows), strict=True))
        answer_prefixes = _split_answer_prefixes(rows, states)
        looping = group_by_adapter_set(row.sequence for row in rows if row.sequence.phase is Phase.LOOP)
        batches = [IterationBatch.from_pass(group, [states[sequence] for sequence in group]) for group in looping]
        # The head's weights are large: if iterations read it, decoding rows are read in the same product.
        reading = [batch for batch in batches if batch.reads_head]
        decoding = [row.sequence for row in rows if row.sequence.phase is Phase.DECODE] if reading else []
        to_read = [
            *(batch.read_states() for batch in reading),
            *(_normed(sequence, states[sequence][-1:]) for sequence in decoding),
        ]
        read = list(self.head(torch.cat(to_read)).split([len(x) for x in to_read])) if reading else []
        logits = dict(zip(decoding, (x[0] for x in read[len(reading) :]), strict=True))
        iterations = [
            iteration for batch in batches for iteration in batch.measure(read.pop(0) if batch.reads_head else None)
        ]
        prefilled = [
            row.sequence
            for row in rows
            if row.sequence.phase is Phase.PREFILL and row.queries == row.sequence.queries()
        ]
        finite = dict.fromkeys(prefilled, True)
        if prefilled:
            table = torch.stack([states[sequence][-1] for sequence in prefilled]).isfinite().all(-1)
            finite = dict(zip(prefilled, table.tolist(), strict=True))
        others = [
            StateOutput(
                sequence,
                queries,
                states[sequence][queries - 1],
                finite.get(sequence, True),
                logits.get(sequence),
                self._score_prompt(sequence, states[sequence]),
            )
            for sequence, queries in rows
            if sequence.phase is not Phase.LOOP
        ]
        return PassOutput(started_at, time.perf_counter(), iterations, others, answer_prefixes)

    def _score_prompt(self, sequence: Sequence, states: Tensor) -> list[TokenScore]:
        request = sequence.request
        if sequence.phase is not Phase.PREFILL or not request.score_prompt:
            return []
        first = [] if sequence.filled else [TokenScore(request.prompt_ids[0], None)]
        start = sequence.filled + 1
        following = request.prompt_ids[start : start + len(states)]
        return first + score_states(self.head, _normed(sequence, states), following, request.logprobs or 0)

    def embed(self, ids: Rows[int]) -> Tensor:
        """Input embeddings ``[n, d]`` of tokens."""
        embedded: Tensor = self.embeddings(torch.tensor(ids, device=self.device))
        return embedded

    # -- next tokens -------------------------------------------------------------------------------

    def read_logits(self, rows: list[Work]) -> tuple[list[LogitsOutput], list[RowFailure]]:
        """Logits at each row's ``read_state``, with row-by-row fallback."""
        outputs: list[LogitsOutput] = []
        failures: list[RowFailure] = []
        if rows:
            self._run_batch_with_fallback(self._read_head, rows, outputs, failures)
        return outputs, failures

    def read_latent_logits(self, rows: list[Work]) -> tuple[list[LogitsOutput], list[RowFailure]]:
        """Logits of the latent decoder, with row-by-row fallback."""
        outputs: list[LogitsOutput] = []
        failures: list[RowFailure] = []
        for group in group_by_adapter_set(row.sequence for row in rows):
            work = [Work(sequence, 0) for sequence in group]
            self._run_batch_with_fallback(self._run_latent_decoder, work, outputs, failures)
        return outputs, failures

    def _read_head(self, rows: list[Work]) -> LogitsOutput:
        sequences = [row.sequence for row in rows]
        unread = [(s, s.read_state) for s in sequences if s.logits is None and s.read_state is not None]
        logits: Tensor | None = self.head(_normed_rows(unread)) if unread else None
        if logits is None or len(unread) < len(sequences):
            fresh = iter(() if logits is None else logits)
            logits = torch.stack([next(fresh) if s.logits is None else s.logits for s in sequences])
        return _logits_output(sequences, logits)

    def _run_latent_decoder(self, rows: list[Work]) -> LogitsOutput:
        sequences = [row.sequence for row in rows]
        memories = [s.adapter_set.workspace.memory(torch.stack(s.states), s.tracker.kept_iterations) for s in sequences]
        decoder = LatentTextDecoder(
            sequences[0].adapter_set.reasoner, memories, [s.request.answer_prefix_ids for s in sequences]
        )
        active = torch.ones(len(sequences), dtype=torch.bool, device=memories[0].device)
        return _logits_output(sequences, decoder.next([s.answer.tokens for s in sequences], active))

    # -- one forward pass --------------------------------------------------------------------------

    def forward(self, work: Rows[Work]) -> list[Tensor]:
        """Run one pass: each row's states ``[queries, d]``.

        It writes only to positions of the slots from each row's ``filled`` on.

        Args:
            work: one of the passes of :func:`split_into_passes`.
        """
        queries = [row.queries for row in work]
        inputs = build_inputs(work, self.embeddings, self.table)
        if self.position_embeddings is not None:
            inputs = remove_position_embeddings(work, inputs, self.position_embeddings)
        ids = [row.sequence.adapter_id for row in work]
        slots, starts, width = [s.slot for s, _ in work], [s.filled for s, _ in work], max(queries)
        cache_starts, raw = [s.cache_start for s, _ in work], [s.adapter_set.raw for s, _ in work]
        mixed_singles = self.packing and width == 1 and len(set(zip(ids, cache_starts, strict=True))) > 1
        if mixed_singles or len(set(map(length_class, work))) > 1:
            return list(torch.split(self._forward_packed(work, ids, inputs), queries))
        if self.fixed_shapes is not None and width == 1 and not any(raw):
            return list(self.fixed_shapes.run(slots, starts, cache_starts, ids, inputs[:, None]))
        order = torch.arange(width, device=self.device)
        position_ids = torch.tensor(starts, device=self.device)[:, None] + order
        positions = position_ids + torch.tensor(cache_starts, device=self.device)[:, None]
        if len(set(queries)) == 1:
            embeds = inputs.view(len(work), width, -1)
        else:
            real = order < torch.tensor(queries, device=self.device)[:, None]
            embeds = inputs.new_zeros(len(work), width, inputs.shape[1])
            embeds[real] = inputs
            # Padding is written to the scratch position, and attends to the first one, so that no mask is empty.
            positions = torch.where(real, positions, self.cache.capacity)
            position_ids = torch.where(real, position_ids, 0)
        hidden = self._forward_padded(slots, ids, embeds, positions, position_ids, read_width(work), cache_starts, raw)
        return [states[:count] for states, count in zip(hidden, queries, strict=True)]

    def run_idle(self, slots: range, width: int) -> Tensor:
        """Run a pass of single positions that read ``width`` positions, each with another adapter, to measure time.

        It writes the last of these positions: ``slots`` must be free.

        Returns:
            States ``[n, d]`` of the ``n`` slots.
        """
        count, rows = self.lora_batch.count, len(slots)
        ids = [row % count if count else None for row in range(rows)]
        embeds = self.table.new_zeros(rows, 1, self.table.shape[1])
        if self.fixed_shapes is not None:
            return self.fixed_shapes.run(slots, [width - 1] * rows, [0] * rows, ids, embeds)[:, 0]
        last = torch.full((rows, 1), width - 1, device=self.device)
        return self._forward_padded(slots, ids, embeds, last, last, width)[:, 0]

    def _forward_padded(
        self,
        slots: Rows[int],
        ids: list[int | None],
        embeds: Tensor,
        positions: Tensor,
        position_ids: Tensor,
        width: int,
        cache_starts: Rows[int] = (0,),
        raw: Rows[bool] = (False,),
    ) -> Tensor:
        """Every row of the batch is a slot: states ``[n, q, d]``.

        Args:
            slots: the slot of each row, in ascending order.
            ids: the adapter of each row.
            embeds: inputs ``[n, q, d]``.
            positions: ``[n, q]`` long, where they are written.
            position_ids: ``[n, q]`` long.
            width: end of the cache positions to read.
            cache_starts: where the key/value cache of each row begins; one number: that of all rows.
            raw: whether each row's states are those before the final norm; one value: for all rows.
        """
        first = min(cache_starts)
        self.cache.bind(slots, positions, width, first=first)
        self.lora_batch.use(ids)
        order = torch.arange(first, width, device=self.device)
        begin = torch.tensor(cache_starts, device=self.device)[:, None, None]
        mask = order <= position_ids[..., None] + begin
        if max(cache_starts) > first:
            mask &= order >= begin
        mask = attention_mask(self.model, mask, embeds.dtype)
        return self._forward(embeds, position_ids, raw, attention_mask=mask)

    def _forward_packed(self, work: Rows[Work], ids: list[int | None], inputs: Tensor) -> Tensor:
        """Every position is a row of the batch: states ``[m, d]``."""
        rows = [row for row, (_, queries) in enumerate(work) for _ in range(queries)]
        position_ids = torch.tensor([s.filled + i for s, queries in work for i in range(queries)], device=self.device)
        positions = position_ids + torch.tensor([work[row].sequence.cache_start for row in rows], device=self.device)
        slots = [work[row].sequence.slot for row in rows]
        self.cache.bind(slots, positions[:, None], self.cache.capacity + 1, read_all=True)
        self.lora_batch.use([ids[row] for row in rows])
        raw = [work[row].sequence.adapter_set.raw for row in rows]
        packed = pack(work, positions, self.cache)
        return self._forward(inputs[:, None], position_ids[:, None], raw, packed=packed)[:, 0]

    def _forward(self, embeds: Tensor, position_ids: Tensor, raw: Rows[bool], **options: Any) -> Tensor:
        with keep_input(find_final_norm(self.model) if any(raw) else None) as before_norm:
            hidden: Tensor = self.model.base_model(
                inputs_embeds=embeds, position_ids=position_ids, past_key_values=self.cache, use_cache=True, **options
            ).last_hidden_state
        if before_norm:
            hidden = torch.where(torch.tensor(raw, device=self.device)[:, None, None], before_norm[0], hidden)
        return hidden


def _normed(sequence: Sequence, states: Tensor) -> Tensor:
    """What the LM head reads of a request's states."""
    return sequence.adapter_set.reasoner.normed(states)


def _normed_rows(rows: list[tuple[Sequence, Tensor]]) -> Tensor:
    """What the LM head reads ``[n, d]`` of one state ``[d]`` of each row."""
    if len({id(sequence.adapter_set) for sequence, _ in rows}) == 1:
        return _normed(rows[0][0], torch.stack([state for _, state in rows]))
    return torch.stack([_normed(sequence, state) for sequence, state in rows])


def _split_answer_prefixes(rows: list[Work], states: dict[Sequence, Tensor]) -> dict[Sequence, StateOutput]:
    """Move the states of answer prefixes out of the states of iterations that ran them."""
    prefixes = {}
    for sequence, _ in rows:
        if sequence.phase is Phase.LOOP and (count := len(sequence.tokens())):
            prefixes[sequence] = StateOutput(sequence, count, states[sequence][-1], True, None, [])
            states[sequence] = states[sequence][:-count]
    return prefixes


def request_error(error: BaseException) -> SLRError:
    """Log an error that one request caused, and turn it into one that its caller can receive."""
    logger.error("A request failed", exc_info=error)
    return error if isinstance(error, SLRError) else EngineError(f"the request failed: {error}")


def _logits_output(sequences: list[Sequence], logits: Tensor) -> LogitsOutput:
    # NaN is the largest value of a row that has one; this is faster than to look for it.
    table = torch.stack([logits.argmax(-1), logits.amax(-1).isnan()], dim=-1).tolist()
    if any(s.answer.generator is not None or s.request.logprobs is not None for s in sequences):
        logits = logits.cpu()  # in one transfer, not row by row
    return LogitsOutput(sequences, logits, [index for index, _ in table], [not has_nan for _, has_nan in table])
